"""The recipes this project ships, by name.

Nothing heavy is imported here: a recipe's module is loaded when the recipe is asked for, so that
an unknown name is refused before Megatron is imported.
"""

from __future__ import annotations

import difflib
import importlib
from typing import TYPE_CHECKING

from megatron.core.models.mimo.errors import ConfigError

if TYPE_CHECKING:
    from megatron.mimo.recipes.recipe import Recipe

__all__ = ["DEFAULT_RECIPE", "load_recipe", "recipe_names"]

DEFAULT_RECIPE = "digits"

_LOCATIONS = {"digits": "megatron.mimo.recipes.digits:digits"}


def recipe_names() -> tuple[str, ...]:
    """The names ``load_recipe`` knows, sorted."""
    return tuple(sorted(_LOCATIONS))


def load_recipe(name: str) -> Recipe:
    """Load a recipe by its name, or from ``package.module:function``.

    Args:
        name: one of ``recipe_names()``, or the import path of a function without arguments that
            returns a ``Recipe`` (how recipes outside this project are used).

    Raises:
        ConfigError: the name is unknown, the module cannot be imported or has no such function.
    """
    location = _LOCATIONS.get(name)
    if location is None and ":" not in name:
        near = difflib.get_close_matches(name, _LOCATIONS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(
            f"unknown recipe {name!r}; {hint}known recipes: {', '.join(recipe_names())}; "
            "a recipe of your own is given as package.module:function"
        )
    module_name, _, function_name = (location or name).partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"recipe {name!r}: cannot import {module_name!r}: no module named {error.name!r}"
        ) from error
    function = getattr(module, function_name, None)
    if function is None:
        raise ConfigError(f"recipe {name!r}: module {module_name!r} has no {function_name!r}")
    recipe: Recipe = function()
    return recipe
