"""LLaVA beyond its tiny configuration: other towers, language models, layers, tied embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron.core.models.mimo.errors import InputError, UnsupportedError
from tests.distributed.models.expected import compute_expected
from tests.distributed.models.ranks import Layout
from tests.distributed.models.test_families import check
from tests.rank_pool import RankPool, model_parallel


def with_siglip_and_qwen2(config: Any) -> None:
    from transformers import Qwen2Config, SiglipVisionConfig

    from megatron.mimo.models.common.tiny import TINY_TEXT, TINY_VISION

    sizes = {key: value for key, value in TINY_VISION.items() if key != "initializer_range"}
    config.vision_config = SiglipVisionConfig(**sizes)
    config.text_config = Qwen2Config(**TINY_TEXT)
    config.vision_feature_layer, config.vision_feature_select_strategy = -1, "full"
    config.multimodal_projector_bias = False


def with_siglip_tiles(config: Any) -> None:
    from transformers import SiglipVisionConfig

    from megatron.mimo.models.common.tiny import TINY_VISION

    sizes = {key: value for key, value in TINY_VISION.items() if key != "initializer_range"}
    config.vision_config = SiglipVisionConfig(**sizes | {"image_size": 26})  # 2 are not seen
    config.vision_feature_select_strategy = "full"
    config.image_grid_pinpoints = [[26, 52], [52, 26], [52, 52]]


def with_layers_and_ties(config: Any) -> None:
    config.vision_feature_layer, config.vision_feature_select_strategy = [0, -3, -1], "full"
    config.projector_hidden_act = "quick_gelu"
    config.tie_word_embeddings = True


RECOMPUTE = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 2,
}


@pytest.mark.parametrize(
    ("name", "change", "layout"),
    [
        ("llava_next", with_siglip_tiles, Layout(tp=2)),
        ("llava", with_siglip_and_qwen2, Layout(tp=2, changes={"sequence_parallel": True})),
        ("llava", with_layers_and_ties, Layout(pp=2)),
        ("llava", with_layers_and_ties, Layout(tp=2, changes=RECOMPUTE)),
    ],
    ids=["siglip-tiles-tp2", "siglip-qwen2-tp2", "layers-tied-pp2", "layers-tied-tp2-recomputed"],
)
def test_other_configurations(
    ranks: RankPool, name: str, change: Callable[[Any], None], layout: Layout
) -> None:
    (expected,) = ranks(1)(compute_expected, name, change)
    check(ranks, name, layout, expected)


def build(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    from megatron.mimo.arguments.standalone import build_model, model_settings
    from megatron.mimo.models import load_family

    model_parallel()
    family = load_family(name)
    config = family.tiny()
    settings = model_settings(family, config, dtype=dtype)
    return build_model(family, config, settings, device=torch.device("cpu")), config


def text_only() -> None:
    model, _ = build("llava_next")
    ids_BS = torch.randint(5, 400, (2, 16))
    losses, _ = model(ids_BS, torch.arange(16).expand(2, -1), labels=ids_BS)
    losses.mean().backward()
    for name, parameter in model.modality_submodules.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_newline_and_tower_get_zero_gradients_of_text(ranks: RankPool) -> None:
    ranks(1)(text_only)


def frozen() -> None:
    model, _ = build("llava_next")
    images = model.modality_submodules["images"]
    model.freeze("images.projections")
    assert not any(parameter.requires_grad for parameter in images.input_projections.parameters())
    assert not images.input_projections[0].newline.requires_grad
    assert all(parameter.requires_grad for parameter in images.encoders.parameters())


def test_the_newline_is_frozen_with_the_projector(ranks: RankPool) -> None:
    ranks(1)(frozen)


def misuse() -> None:
    model, config = build("llava_next")
    images = model.modality_submodules["images"]
    tiles = torch.zeros(2, 3, 24, 24)
    with pytest.raises(InputError, match="1 row_sources for 2 images; expected one for each"):
        images({"clip": {"pixel_values": [tiles, tiles], "row_sources": [torch.arange(3)]}})
    with pytest.raises(UnsupportedError, match="takes no hidden_states"):
        images(hidden_states=torch.zeros(3, 32))
    rows = images({"clip": {"pixel_values": [tiles, tiles[:1]]}})
    newline = images.input_projections[0].newline
    assert rows.shape == (18 + 1 + 9 + 1, config.text_config.hidden_size)
    torch.testing.assert_close(rows[[18, 28]], newline.expand(2, -1))


def test_row_sources_have_to_fit(ranks: RankPool) -> None:
    ranks(1)(misuse)


def low_precision() -> None:
    from megatron.mimo.data import SampleCollator
    from megatron.mimo.models import load_family

    model, config = build("llava_next", torch.bfloat16)
    family, generator = load_family("llava_next"), torch.Generator().manual_seed(0)
    sample = family.sample(config, family.example(config, generator))
    collator = SampleCollator(
        seq_length=len(sample.token_ids),
        vocab_size=config.text_config.vocab_size,
        pad_id=0,
        special_token_ids=family.media(config).special_token_ids,
        media_formats=family.media(config).formats,
    )
    losses, mask = model(**collator([sample]))
    (losses * mask).sum().backward()
    newline = model.modality_submodules["images"].input_projections[0].newline
    assert newline.dtype == torch.bfloat16
    assert newline.grad.norm() > 0


def test_runs_in_bf16(ranks: RankPool) -> None:
    ranks(1)(low_precision)
