"""InternVL beyond its tiny configuration: the large tower, other language models, features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron.core.models.mimo.errors import ConfigError, InputError, UnsupportedError
from megatron.mimo.models import load_family
from tests.distributed.models.expected import compute_expected
from tests.distributed.models.ranks import Layout
from tests.distributed.models.test_families import check
from tests.distributed.models.text_kinds import EXPERTS
from tests.rank_pool import RankPool

FAMILY = load_family("internvl")
RECOMPUTE = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}


def with_the_large_tower(config: Any) -> None:
    vision = config.vision_config
    vision.attention_bias, vision.use_qk_norm, vision.norm_type = False, True, "rms_norm"
    vision.use_mask_token = True


def with_qwen2_and_ties(config: Any) -> None:
    """Fields as in InternVL 3, a norm behind the tower, and larger squares."""
    from transformers import Qwen2Config

    from megatron.mimo.models.common.tiny import TINY_TEXT

    config.text_config = Qwen2Config(**TINY_TEXT)
    config.tie_word_embeddings = True
    config.vision_config.use_mean_pooling = False
    config.downsample_ratio, config.projector_hidden_act = 0.25, "relu"


def with_an_inner_layer(config: Any) -> None:
    config.vision_feature_layer = -2
    config.vision_config.use_qk_norm = True


def with_experts(config: Any) -> None:
    from transformers import AutoConfig

    from megatron.mimo.models.common.tiny import TINY_TEXT

    config.text_config = AutoConfig.for_model(**TINY_TEXT | EXPERTS)


@pytest.mark.parametrize(
    ("change", "layout"),
    [
        (with_experts, Layout()),
        (with_experts, Layout(dp=2, ep=2)),
        (with_experts, Layout(tp=2, changes={"sequence_parallel": True})),
        (with_the_large_tower, Layout(tp=2, changes={"sequence_parallel": True})),
        (with_the_large_tower, Layout(pp=2)),
        (with_qwen2_and_ties, Layout(cp=2)),
        (with_an_inner_layer, Layout(tp=2, changes=RECOMPUTE)),
    ],
    ids=[
        "experts",
        "experts-ep2",
        "experts-tp2-sp",
        "large-tp2-sp",
        "large-pp2",
        "qwen2-tied-cp2",
        "inner-layer-tp2-recomputed",
    ],
)
def test_other_configurations(
    ranks: RankPool, change: Callable[[Any], None], layout: Layout
) -> None:
    (expected,) = ranks(1)(compute_expected, "internvl", change)
    check(ranks, "internvl", layout, expected)


@pytest.mark.parametrize(
    ("part", "name", "value", "message"),
    [
        ("", "downsample_ratio", 0.7, r"downsample_ratio is 0\.7; expected one divided by a whole"),
        ("", "downsample_ratio", -1.0, "downsample_ratio is -1.0"),
        ("", "downsample_ratio", 1 / 3, r"4 x 4 patches; expected .* squares of 3 x 3 fill"),
        ("", "vision_feature_layer", [-1, -2], r"vision_feature_layer is \[-1, -2\]"),
        ("", "vision_feature_select_strategy", "full", "expected 'default'"),
        ("vision_config", "image_size", [32, 64], r"image_size is \[32, 64\]; expected two equal"),
        ("vision_config", "patch_size", [8, 4], r"patch_size is \[8, 4\]; expected two equal"),
        ("vision_config", "norm_type", "batch_norm", "norm_type is 'batch_norm'"),
        ("vision_config", "projection_dropout", 0.1, r"projection_dropout is 0\.1; expected 0"),
        ("text_config", "model_type", "mistral", "text_config.model_type is 'mistral'"),
    ],
)
def test_what_it_does_not_have_is_refused(part: str, name: str, value: Any, message: str) -> None:
    config: Any = FAMILY.tiny()
    setattr(getattr(config, part) if part else config, name, value)
    with pytest.raises(UnsupportedError, match=message):
        FAMILY.arguments(config)


def test_a_norm_behind_rms_norms_is_refused() -> None:
    config: Any = FAMILY.tiny()
    config.vision_config.use_mean_pooling, config.vision_config.norm_type = False, "rms_norm"
    with pytest.raises(UnsupportedError, match="use_mean_pooling is False, with norm_type 'rms"):
        FAMILY.arguments(config)


def heads_that_do_not_divide() -> None:
    from megatron.mimo.arguments.standalone import build_model, model_settings
    from tests.rank_pool import model_parallel

    model_parallel(tp=2)
    config: Any = FAMILY.tiny()
    config.vision_config.num_attention_heads, config.vision_config.hidden_size = 5, 40
    settings = model_settings(FAMILY, config, tp_size=2)
    with pytest.raises(ConfigError, match="the encoder's 5 attention heads are not divisible by"):
        build_model(FAMILY, config, settings, device=torch.device("cpu"))


def test_heads_that_tensor_parallelism_does_not_divide(ranks: RankPool) -> None:
    ranks(2)(heads_that_do_not_divide)


def test_tiles_without_text_between_are_one_item() -> None:
    config = FAMILY.tiny()
    tokens = [9, 5, *[4] * 12, 6, 9, 5, *[4] * 4, 6, 9]
    tiles = torch.arange(4.0)[:, None, None, None].expand(4, 3, 32, 32)
    given = {"input_ids": torch.tensor([tokens]), "pixel_values": tiles}
    sample = FAMILY.sample(config, given)
    assert [item.rows for item in sample.media] == [12, 4]
    found = [item.inputs["pixel_values"][:, 0, 0, 0].tolist() for item in sample.media]
    assert found == [[0, 1, 2], [3]]
    assert sample.is_label.tolist() == [token != 4 for token in tokens]


@pytest.mark.parametrize(
    ("tokens", "tiles"), [([4] * 4, 2), ([4] * 6 + [9] + [4] * 2, 2), ([9], 1), ([4] * 4, None)]
)
def test_tokens_that_are_not_those_of_the_tiles(tokens: list[int], tiles: int | None) -> None:
    given = {"input_ids": torch.tensor([tokens])}
    if tiles is not None:
        given["pixel_values"] = torch.zeros(tiles, 3, 32, 32)
    with pytest.raises(InputError, match=r"sample sample: runs of .* tiles; expected 4 for each"):
        FAMILY.sample(FAMILY.tiny(), given)
