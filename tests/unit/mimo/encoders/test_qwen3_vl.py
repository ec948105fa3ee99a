"""Qwen3-VL's vision encoder against transformers', and what it refuses.

Shape legend: T patches, E values of a patch, R rows, O output width.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.core.models.mimo.errors import ConfigError, InputError
from tests.rank_pool import RankPool

# Of 5 x 5 learned positions: fewer patches, as many along one side, more; clips.
GRIDS = [(1, 2, 2), (1, 10, 6), (3, 4, 2), (1, 8, 8), (2, 6, 10)]


@pytest.mark.parametrize("side", [1, 5, 48])
def test_positions_and_rotation_are_those_of_transformers(side: int) -> None:
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionRotaryEmbedding
    from transformers.vision_utils import (
        get_vision_cu_seqlens,
        get_vision_interpolation_indices_and_weights,
        get_vision_position_ids,
    )

    from megatron.mimo.encoders.qwen3_vl_geometry import FrameGeometry, frame_sequence
    from megatron.mimo.models.qwen3_vl.model import tiny

    geometry, grid_thw = FrameGeometry(merge=2, head_size=8, side=side), torch.tensor(GRIDS)
    found = frame_sequence(tuple(GRIDS), geometry, torch.device("cpu"), borders_on_host=True)
    taps_T4, weights_T4 = get_vision_interpolation_indices_and_weights(
        grid_thw, num_grid_per_side=side, align_corners=True, spatial_merge_size=2
    )
    assert found.taps_T4.tolist() == taps_T4.tolist()
    assert torch.equal(found.weights_T4, weights_T4)
    assert found.cu_seqlens_q.tolist() == get_vision_cu_seqlens(grid_thw).tolist()
    assert found.max_seqlen_q == 64
    rotary = Qwen3VLVisionRotaryEmbedding(tiny().vision_config)
    cos_TD, sin_TD = rotary(torch.zeros(()), get_vision_position_ids(grid_thw, 2))
    torch.testing.assert_close(found.turns_TD[:, :4], cos_TD[:, :4], rtol=0, atol=1e-6)
    torch.testing.assert_close(found.turns_TD[:, 4:], sin_TD[:, :4], rtol=0, atol=1e-6)


def random_pixels(grids: list[tuple[int, int, int]]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(t * h * w, 96, generator=generator) for t, h, w in grids]


def build(tp: int, **changes: object) -> tuple[Any, Any]:
    """Our images part and transformers' encoder, with the same weights."""
    from megatron.core import parallel_state
    from megatron.mimo.arguments.standalone import build_model, model_settings
    from megatron.mimo.checkpoints.weights import load_hugging_face
    from megatron.mimo.models import load_family
    from tests.rank_pool import model_parallel

    if not parallel_state.model_parallel_is_initialized():
        model_parallel(tp=tp)
    family = load_family("qwen3_vl")
    config = family.tiny()
    torch.manual_seed(2)
    reference: Any = family.reference(config)
    with torch.no_grad():
        for parameter in reference.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    settings = model_settings(family, config, tp_size=tp, changes=changes)
    model = build_model(family, config, settings, device=torch.device("cpu"))
    load_hugging_face(model, reference.state_dict(), family.keys(config))
    return model.modality_submodules["images"], reference.model.visual


def compare_rows(tp: int) -> tuple[list[float], list[float], bool]:
    """Distance of rows and levels from transformers', and of all items from each; all saved."""
    images, reference = build(tp)
    pixels = random_pixels(GRIDS)
    with torch.no_grad():
        encoded = images({"qwen3_vl": {"pixel_values": pixels, "grid": GRIDS}})
        output = reference(torch.cat(pixels), grid_thw=torch.tensor(GRIDS))
        parts = [
            images({"qwen3_vl": {"pixel_values": [one], "grid": [grid]}})
            for one, grid in zip(pixels, GRIDS, strict=True)
        ]
    wanted = [output.pooler_output, *output.deepstack_features]
    alone = [torch.cat(same) for same in zip(*(part.tensors for part in parts), strict=True)]
    assert [list(one.shape) for one in encoded.tensors] == [[68, 64]] * 3
    encoder = images.encoders["qwen3_vl"]
    assert encoder.rows_per_item(pixel_values=pixels, grid=GRIDS) == [1, 15, 6, 16, 30]
    assert min(one.abs().mean() for one in wanted) > 0.1

    def distances(others: list[Tensor]) -> list[float]:
        return [
            (one - other).abs().max().item()
            for one, other in zip(encoded.tensors, others, strict=True)
        ]

    state = images.sharded_state_dict().values()
    saved = {one.data.data_ptr() for one in state if getattr(one, "data", None) is not None}
    return (
        distances(wanted),
        distances(alone),
        saved == {parameter.data_ptr() for parameter in images.parameters()},
    )


@pytest.mark.parametrize("tp", [1, 2])
def test_rows_and_levels_are_those_of_transformers(ranks: RankPool, tp: int) -> None:
    for from_reference, from_alone, all_saved in ranks(tp)(compare_rows, tp):
        assert max(from_reference) < 1e-4
        assert max(from_alone) < 3e-5
        assert all_saved


def recomputed() -> list[float]:
    """Largest difference that recomputing all layers by the pair makes, for each parameter."""
    changes = {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 2,
    }
    inputs = {"qwen3_vl": {"pixel_values": random_pixels(GRIDS), "grid": GRIDS}}
    gradients = []
    for given in ({}, changes):
        images, _ = build(1, **given)
        encoded = images.train()(inputs)
        sum(
            (1 + number) * one.square().sum() for number, one in enumerate(encoded.tensors)
        ).backward()
        gradients.append([parameter.grad for parameter in images.parameters()])
    return [
        ((one - other).norm() / one.norm()).item() for one, other in zip(*gradients, strict=True)
    ]


def test_levels_of_recomputed_layers(ranks: RankPool) -> None:
    """Level 0 is of the first layer, which two layers recomputed as one would not give."""
    (errors,) = ranks(1)(recomputed)
    assert len(errors) > 40
    assert max(errors) < 1e-5


def without_items() -> tuple[list[tuple[int, ...]], list[bool]]:
    images, _ = build(1)
    encoded = images({"qwen3_vl": {"pixel_values": [], "grid": []}})
    sum(one.sum() for one in encoded.tensors).backward()
    gradients = [parameter.grad for parameter in images.parameters()]
    return [tuple(one.shape) for one in encoded.tensors], [
        one is not None and not one.any() for one in gradients
    ]


def test_no_items_give_no_rows_and_zero_gradients(ranks: RankPool) -> None:
    [(shapes, zero)] = ranks(1)(without_items)
    assert shapes == [(0, 64)] * 3
    assert zero
    assert all(zero)


def in_bf16() -> tuple[torch.dtype, float]:
    images, _ = build(1)
    inputs = {"qwen3_vl": {"pixel_values": random_pixels(GRIDS), "grid": GRIDS}}
    with torch.no_grad():
        wanted = torch.stack(images(inputs).tensors)
        rounded = torch.stack(images.bfloat16()(inputs).tensors)
    return rounded.dtype, ((rounded - wanted).norm() / wanted.norm()).item()


def test_runs_in_bf16(ranks: RankPool) -> None:
    [(dtype, error)] = ranks(1)(in_bf16)
    assert dtype == torch.bfloat16
    assert error < 0.05


def waits() -> dict[str, int]:
    """What the host waits for in a forward and backward pass over items of new sizes."""
    from megatron.mimo.backend.host_sync import HostSyncCounter

    images, _ = build(1)
    grids = [(1, 4, 6), (2, 2, 12)]
    pixels = random_pixels(grids)
    with HostSyncCounter() as counter:
        encoded = images({"qwen3_vl": {"pixel_values": pixels, "grid": grids}})
        torch.stack(encoded.tensors).square().sum().backward()
    return dict(counter.counts)


def test_never_waits_for_the_device(ranks: RankPool) -> None:
    assert ranks(1)(waits) == [{}]


def refused(level_layers: list[int]) -> str:
    """What an encoder of four layers says to levels of these."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.spec_utils import build_module
    from megatron.mimo.arguments.standalone import model_settings
    from megatron.mimo.models import load_family
    from megatron.mimo.models.common.frame_tower import vision_specs
    from megatron.mimo.models.common.place import Place
    from tests.rank_pool import model_parallel

    model_parallel()
    family = load_family("qwen3_vl")
    settings, vision = model_settings(family, family.tiny()), family.tiny().vision_config
    vision.deepstack_visual_indexes = level_layers
    place = Place(groups=ProcessGroupCollection.use_mpu_process_groups())
    specs = vision_specs(vision, settings.transformer, place)
    try:
        build_module(specs["encoders"]["qwen3_vl"])
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("layers", [[2, 0], [0, 4]])
def test_levels_of_no_layers_are_refused(ranks: RankPool, layers: list[int]) -> None:
    [told] = ranks(1)(refused, layers)
    assert f"levels are given by layers {layers}; expected ascending numbers from 0 to 3" in told


def test_impossible_geometries_are_refused() -> None:
    from megatron.mimo.encoders.qwen3_vl_geometry import FrameGeometry, frame_sequence

    with pytest.raises(ConfigError, match="a grid of 0 x 0 positions"):
        FrameGeometry(merge=2, head_size=8, side=0)
    with pytest.raises(ConfigError, match="squares of 0 x 0 patches"):
        FrameGeometry(merge=0, head_size=8, side=4)
    geometry = FrameGeometry(merge=2, head_size=8, side=4)
    with pytest.raises(InputError, match=r"a grid is \(1, 3, 2\)"):
        frame_sequence(((1, 3, 2),), geometry, torch.device("cpu"), borders_on_host=True)
