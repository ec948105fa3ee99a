"""Qwen2.5-VL's vision encoder against transformers', and what it refuses.

Shape legend: T patches, E values of a patch, R rows, O output width.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.core.models.mimo.errors import ConfigError, InputError
from tests.rank_pool import RankPool

# Windows are 2 x 2 squares of 2 x 2 patches: narrower than a window, as wide, no multiple of it.
GRIDS = [(1, 2, 2), (1, 10, 6), (3, 4, 2), (1, 8, 8), (2, 6, 10)]


def reference_sequence(grids: list[tuple[int, int, int]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Order of squares, borders of windows, of frames, and angles, from transformers."""
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLVisionRotaryEmbedding
    from transformers.vision_utils import (
        get_vision_cu_seqlens,
        get_vision_position_ids,
        get_vision_window_index,
    )

    from megatron.mimo.models.qwen2_5_vl.model import tiny

    vision, grid_thw = tiny().vision_config, torch.tensor(grids)
    order_R, windows = get_vision_window_index(
        grid_thw,
        spatial_merge_size=vision.spatial_merge_size,
        window_size=vision.window_size,
        patch_size=vision.patch_size,
    )
    rotary = Qwen2_5_VLVisionRotaryEmbedding(vision)
    cos_TD, _ = rotary(torch.zeros(()), get_vision_position_ids(grid_thw, 2))
    return order_R, windows, get_vision_cu_seqlens(grid_thw), cos_TD[:, : cos_TD.size(1) // 2]


def test_order_windows_and_rotation_are_those_of_transformers() -> None:
    from megatron.mimo.encoders.qwen2_5_vl_geometry import PatchGeometry, patch_sequence

    geometry = PatchGeometry(merge=2, window=2, head_size=8)
    found = patch_sequence(tuple(GRIDS), geometry, torch.device("cpu"), borders_on_host=True)
    order_R, windows, frames, cos_TD = reference_sequence(GRIDS)
    assert found.places_R.tolist() == order_R.argsort().tolist()
    assert found.windows.cu_seqlens_q.tolist() == windows.tolist()
    assert found.windows.max_seqlen_q == int(windows.diff().max())
    assert found.cu_seqlens_q.tolist() == frames.tolist()
    assert found.max_seqlen_q == 64
    order_T = (order_R[:, None] * 4 + torch.arange(4)).flatten()
    assert found.order_T.tolist() == order_T.tolist()
    torch.testing.assert_close(found.turns_TD.chunk(2, 1)[0], cos_TD[order_T], rtol=0, atol=1e-6)
    again = patch_sequence(tuple(GRIDS), geometry, torch.device("cpu"), borders_on_host=True)
    assert again is found


def test_a_sequence_made_for_inference_serves_training() -> None:
    from megatron.mimo.encoders.qwen2_5_vl_geometry import PatchGeometry, patch_sequence

    geometry = PatchGeometry(merge=2, window=3, head_size=4)
    with torch.inference_mode():
        found = patch_sequence(((1, 2, 4),), geometry, torch.device("cpu"), borders_on_host=True)
    assert not found.turns_TD.is_inference()
    assert not found.order_T.is_inference()


def random_pixels(grids: list[tuple[int, int, int]]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    pixels = [torch.randn(t * h * w, 96, generator=generator) for t, h, w in grids]
    return [0.01 * pixels[0], *pixels[1:]]  # so faint that the norms' epsilon shows


def build(tp: int) -> tuple[Any, Any]:
    """Our images part and transformers' encoder, with the same weights."""
    from megatron.mimo.arguments.standalone import build_model, model_settings
    from megatron.mimo.checkpoints.weights import load_hugging_face
    from megatron.mimo.models import load_family
    from tests.rank_pool import model_parallel

    model_parallel(tp=tp)
    family = load_family("qwen2_5_vl")
    config = family.tiny()
    torch.manual_seed(2)
    reference: Any = family.reference(config)
    with torch.no_grad():
        for parameter in reference.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    settings = model_settings(family, config, tp_size=tp)
    model = build_model(family, config, settings, device=torch.device("cpu"))
    load_hugging_face(model, reference.state_dict(), family.keys(config))
    return model.modality_submodules["images"], reference.model.visual


def compare_rows(tp: int) -> tuple[float, float, bool]:
    """Distance of our rows from transformers', of all items together from each alone, saved all."""
    images, reference = build(tp)
    pixels = random_pixels(GRIDS)
    with torch.no_grad():
        rows_RO = images({"qwen2_5_vl": {"pixel_values": pixels, "grid": GRIDS}})
        wanted_RO = reference(torch.cat(pixels), grid_thw=torch.tensor(GRIDS)).pooler_output
        alone_RO = torch.cat(
            [
                images({"qwen2_5_vl": {"pixel_values": [one], "grid": [grid]}})
                for one, grid in zip(pixels, GRIDS, strict=True)
            ]
        )
    assert rows_RO.shape == (1 + 15 + 6 + 16 + 30, 64)
    encoder = images.encoders["qwen2_5_vl"]
    assert encoder.rows_per_item(pixel_values=pixels, grid=GRIDS) == [1, 15, 6, 16, 30]
    assert wanted_RO.abs().mean() > 0.1
    saved = {shard.data.data_ptr() for shard in tensors_of(images.sharded_state_dict())}
    return (
        (rows_RO - wanted_RO).abs().max().item(),
        (rows_RO - alone_RO).abs().max().item(),
        saved == {parameter.data_ptr() for parameter in images.parameters()},
    )


def tensors_of(state: dict[str, Any]) -> list[Any]:
    """Sharded tensors, those that factories (of gated MLPs) would make of one included."""
    return [value for value in state.values() if getattr(value, "data", None) is not None]


@pytest.mark.parametrize("tp", [1, 2])
def test_rows_are_those_of_transformers(ranks: RankPool, tp: int) -> None:
    for from_reference, from_alone, all_saved in ranks(tp)(compare_rows, tp):
        assert from_reference < 1e-4
        # Four patches alone go through another kernel than among 272, which rounds the embedding of
        # the faint item 1.5e-8 differently; its first norm makes 7e-7 of that, three layers 1.3e-5.
        # Both are within 1e-5 of fp64, as transformers is, so they differ by up to 2e-5 (the rows
        # reach 16, where fp32 steps by 1e-6). Rows that saw another item would differ by 0.1.
        assert from_alone < 3e-5
        assert all_saved


def without_items() -> tuple[tuple[int, ...], list[bool]]:
    images, _ = build(1)
    rows_RO = images({"qwen2_5_vl": {"pixel_values": [], "grid": []}})
    rows_RO.sum().backward()
    gradients = [parameter.grad for parameter in images.parameters()]
    return tuple(rows_RO.shape), [one is not None and not one.any() for one in gradients]


def in_bf16() -> tuple[torch.dtype, float]:
    images, _ = build(1)
    inputs = {"qwen2_5_vl": {"pixel_values": random_pixels(GRIDS), "grid": GRIDS}}
    with torch.no_grad():
        wanted_RO = images(inputs)
        rows_RO = images.bfloat16()(inputs)
    return rows_RO.dtype, ((rows_RO - wanted_RO).norm() / wanted_RO.norm()).item()


def refusals() -> list[str]:
    """What wrong calls are told."""
    images, _ = build(1)
    encoder = images.encoders["qwen2_5_vl"]
    pixels = torch.zeros(8, 96)
    calls = [
        ([pixels], []),
        ([pixels], [(1, 4, 3)]),
        ([pixels], [(1, 4, 4)]),
        ([pixels.long()], [(1, 4, 2)]),
        ([pixels], [torch.tensor([1, 4, 2])]),
    ]
    told = []
    for pixel_values, grid in calls:
        try:
            encoder(pixel_values=pixel_values, grid=grid)
        except InputError as error:
            told.append(str(error))
    return told


def test_no_items_give_no_rows_and_zero_gradients(ranks: RankPool) -> None:
    [(shape, zero)] = ranks(1)(without_items)
    assert shape == (0, 64)
    assert zero
    assert all(zero)


def test_runs_in_bf16(ranks: RankPool) -> None:
    [(dtype, error)] = ranks(1)(in_bf16)
    assert dtype == torch.bfloat16
    assert error < 0.05


def test_patches_and_grids_that_do_not_fit_are_refused(ranks: RankPool) -> None:
    [told] = ranks(1)(refusals)
    wanted = [
        "pixel_values of 1 items and 0 grids",
        "a grid is (1, 4, 3); expected (frames, lines, columns)",
        "item 0, whose grid is (1, 4, 4), are torch.float32 [8, 96]; expected floating point "
        "[16, 96]",
        "torch.int64 [8, 96]",
        "as positive integers on the host",
    ]
    assert len(told) == len(wanted)
    for message, part in zip(told, wanted, strict=True):
        assert part in message


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"merge": 2, "window": 0, "head_size": 8}, "windows of 0 x 0 squares"),
        ({"merge": 2, "window": 2, "head_size": 6}, "head size is 6"),
    ],
)
def test_impossible_geometries_are_refused(sizes: dict[str, int], message: str) -> None:
    from megatron.mimo.encoders.qwen2_5_vl_geometry import PatchGeometry

    with pytest.raises(ConfigError, match=message):
        PatchGeometry(**sizes)


def waits() -> dict[str, int]:
    """What the host waits for in a forward and backward pass over items of new sizes."""
    from megatron.mimo.backend.host_sync import HostSyncCounter

    images, _ = build(1)
    grids = [(1, 4, 6), (2, 2, 12)]
    pixels = random_pixels(grids)
    with HostSyncCounter() as counter:
        rows_RO = images({"qwen2_5_vl": {"pixel_values": pixels, "grid": grids}})
        rows_RO.square().sum().backward()
    return dict(counter.counts)


def test_never_waits_for_the_device(ranks: RankPool) -> None:
    assert ranks(1)(waits) == [{}]
