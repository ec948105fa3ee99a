"""The published models of a family at their real sizes, without memory."""

from __future__ import annotations

from tests.cards.page import FullSize
from tests.distributed.models.test_published_sizes import RECIPES, match_on_meta
from tests.rank_pool import RankPool

__all__ = ["full_sizes"]


def full_sizes(pool: RankPool, name: str) -> list[FullSize]:
    """Every recipe of the family; raises where a name or a shape differs."""
    found = []
    for recipe in RECIPES:
        if _family_of(recipe) == name:
            ((parameters, weights),) = pool(1, timeout=300)(match_on_meta, recipe)
            found.append(FullSize(recipe=recipe, parameters=parameters, weights=weights))
    return found


def _family_of(recipe: str) -> str:
    from megatron.mimo.models import family_of
    from megatron.mimo.recipes import load_recipe

    make_config = load_recipe(recipe).hf_config
    assert make_config is not None
    return family_of(make_config()).name
