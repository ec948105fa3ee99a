"""The published models at their real sizes, without memory: names and shapes of all weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.rank_pool import RankPool
from tests.tiers import some
from tests.time_limits import HANG

RECIPES = (
    "gemma3_4b",
    "gemma3_12b",
    "gemma3_27b",
    "internvl3_5_1b",
    "internvl3_5_8b",
    "internvl3_5_14b",
    "internvl3_5_30b_a3b",
    "internvl3_5_38b",
    "internvl3_8b",
    "llava_1_5_7b",
    "llava_1_5_13b",
    "llava_next",
    "llava_avlm",
    "qwen2_audio_7b",
    "qwen2_5_vl_3b",
    "qwen2_5_vl_7b",
    "qwen3_vl_2b",
    "qwen3_vl_4b",
    "qwen3_vl_8b",
    "qwen3_vl_32b",
    "qwen3_vl_30b_a3b",
    "qwen3_5_4b",
    "qwen3_5_35b_a3b",
)


def match_on_meta(recipe: str, change: Callable[[Any], None] | None = None) -> tuple[int, int]:
    """Raises where a name or shape differs; numbers of parameters and of weights compared."""
    import torch

    from megatron.mimo.arguments.standalone import build_model, model_settings, process_groups
    from megatron.mimo.checkpoints.match import check_shapes, match_names
    from megatron.mimo.checkpoints.slots import match_slots, model_slots
    from megatron.mimo.models import family_of
    from megatron.mimo.recipes import load_recipe

    make_config = load_recipe(recipe).hf_config
    assert make_config is not None
    config = make_config()
    if change is not None:
        change(config)
    family, meta = family_of(config), torch.device("meta")
    with meta:
        theirs = family.reference(config).state_dict()
    with process_groups():
        model = build_model(family, config, model_settings(family, config), device=meta)
        theirs, table = family.keys(config).laid_out(theirs)
        match = match_names(theirs.keys(), table, source=recipe)
        matched = list(match_slots(model_slots(model), table))
    for slot, row in matched:
        shapes = {name: tuple(theirs[match.given[name]].shape) for name in row.hf}
        check_shapes(table.hf_shapes(row, slot.shape), shapes, source=recipe)
    assert {row.mimo for _, row in matched} == {row.mimo for row in table.each()}
    return sum(one.numel() for one in theirs.values()), len(match.given)


# of each family, and of each kind of its encoders and language models, one size
KINDS = (
    *("gemma3_4b", "internvl3_5_1b", "internvl3_5_38b", "internvl3_8b", "llava_1_5_7b"),
    *("llava_next", "llava_avlm", "qwen2_audio_7b", "qwen2_5_vl_3b", "qwen3_vl_2b", "qwen3_vl_8b"),
    "qwen3_5_4b",
)


@pytest.mark.parametrize("recipe", some(RECIPES, *KINDS))
def test_every_weight_has_its_place(ranks: RankPool, recipe: str) -> None:
    ranks(1, timeout=HANG)(match_on_meta, recipe)


def shorten(config: Any) -> None:
    text = config.text_config
    text.num_hidden_layers = 4
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:4]


@pytest.mark.parametrize(
    "recipe", some([name for name in RECIPES if name.endswith("_a3b")], "qwen3_vl_30b_a3b")
)
def test_every_weight_of_some_layers_of_experts(ranks: RankPool, recipe: str) -> None:
    """All layers are ten thousands of weights: twenty seconds."""
    ranks(1)(match_on_meta, recipe, shorten)
