"""The recipes this project ships, by name.

Nothing heavy is imported here (Megatron takes seconds): a recipe's module is loaded when the recipe
is asked for, and the class of an error when it is raised.
"""

from __future__ import annotations

import difflib
import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron.mimo.recipes.recipe import Recipe

__all__ = ["DEFAULT_RECIPE", "load_recipe", "locate_recipe", "recipe_names", "recipe_summaries"]

DEFAULT_RECIPE = "digits"

# Name -> where it is, and its summary: a recipe's own says the same, but costs loading it.
_RECIPES = {
    "digits": (
        "digits:digits",
        "read 1 to 4 scanned digits; ViT + GPT from scratch, two minutes on 2 CPU cores",
    ),
    "digits_dialled": (
        "digits_dialled:digits_dialled",
        "numbers that are read, heard as telephone tones, or both; two encoders + GPT",
    ),
    "gemma3_12b": ("gemma3:gemma3_12b", "Gemma 3 12B, SigLIP with pan-and-scan"),
    "gemma3_27b": ("gemma3:gemma3_27b", "Gemma 3 27B, SigLIP with pan-and-scan"),
    "gemma3_4b": ("gemma3:gemma3_4b", "Gemma 3 4B, SigLIP with pan-and-scan"),
    "gemma3_tiny": (
        "tiny.gemma3:gemma3_tiny",
        "Gemma 3 of 0.2 million parameters that reads scanned digits",
    ),
    "internvl3_5_14b": ("internvl:internvl3_5_14b", "InternVL 3.5, InternViT 300M + Qwen3 14B"),
    "internvl3_5_1b": ("internvl:internvl3_5_1b", "InternVL 3.5, InternViT 300M + Qwen3 0.6B"),
    "internvl3_5_30b_a3b": (
        "internvl:internvl3_5_30b_a3b",
        "InternVL 3.5, InternViT 300M + Qwen3 30B-A3B",
    ),
    "internvl3_5_38b": ("internvl:internvl3_5_38b", "InternVL 3.5, InternViT 6B + Qwen3 32B"),
    "internvl3_5_8b": ("internvl:internvl3_5_8b", "InternVL 3.5, InternViT 300M + Qwen3 8B"),
    "internvl_tiny": (
        "tiny.internvl:internvl_tiny",
        "InternVL 3.5 of 0.2 million parameters that reads digits in images and clips",
    ),
    "internvl3_8b": ("internvl:internvl3_8b", "InternVL 3, InternViT 300M + Qwen2.5 7B"),
    "llava_1_5_13b": ("llava:llava_1_5_13b", "LLaVA 1.5, CLIP + Vicuna 13B"),
    "llava_1_5_7b": ("llava:llava_1_5_7b", "LLaVA 1.5, CLIP + Vicuna 7B"),
    "llava_avlm": ("llava_avlm:llava_avlm", "LLaVA with ears, CLIP + Whisper large + Vicuna 7B"),
    "llava_avlm_tiny": (
        "tiny.llava_avlm:llava_avlm_tiny",
        "LLaVA with ears of 0.3 million parameters: digits and tones",
    ),
    "llava_next": ("llava_next:llava_next", "LLaVA 1.6, CLIP on tiles + Mistral 7B"),
    "llava_next_tiny": (
        "tiny.llava_next:llava_next_tiny",
        "LLaVA 1.6 of 0.2 million parameters that reads scanned digits",
    ),
    "llava_tiny": (
        "tiny.llava:llava_tiny",
        "LLaVA of 0.2 million parameters that reads scanned digits",
    ),
    "qwen2_5_vl_3b": ("qwen2_5_vl:qwen2_5_vl_3b", "Qwen2.5-VL 3B, images and video"),
    "qwen2_5_vl_7b": ("qwen2_5_vl:qwen2_5_vl_7b", "Qwen2.5-VL 7B, images and video"),
    "qwen2_5_vl_tiny": (
        "tiny.qwen2_5_vl:qwen2_5_vl_tiny",
        "Qwen2.5-VL of 0.2 million parameters, on digits in images and clips",
    ),
    "qwen2_audio_7b": ("qwen2_audio:qwen2_audio_7b", "Qwen2-Audio, Whisper large + Qwen 7B"),
    "qwen2_audio_tiny": (
        "tiny.qwen2_audio:qwen2_audio_tiny",
        "Qwen2-Audio of 0.2 million parameters that names tones",
    ),
    "qwen3_5_27b": (
        "qwen3_5:qwen3_5_27b",
        "Qwen3.5 27B, gated delta net, images and video",
    ),
    "qwen3_5_35b_a3b": (
        "qwen3_5_moe:qwen3_5_35b_a3b",
        "Qwen3.5 35B-A3B, gated delta net, images and video",
    ),
    "qwen3_5_4b": ("qwen3_5:qwen3_5_4b", "Qwen3.5 4B, gated delta net, images and video"),
    "qwen3_5_9b": ("qwen3_5:qwen3_5_9b", "Qwen3.5 9B, gated delta net, images and video"),
    "qwen3_5_moe_tiny": (
        "tiny.qwen3_5:qwen3_5_moe_tiny",
        "Qwen3.5 of 0.4 million parameters, most of them in experts, on digits",
    ),
    "qwen3_5_tiny": (
        "tiny.qwen3_5:qwen3_5_tiny",
        "Qwen3.5 of 0.3 million parameters, on digits in images and clips",
    ),
    "qwen3_vl_235b_a22b": (
        "qwen3_vl_moe:qwen3_vl_235b_a22b",
        "Qwen3-VL 235B-A22B, images and video",
    ),
    "qwen3_vl_2b": ("qwen3_vl:qwen3_vl_2b", "Qwen3-VL 2B, images and video"),
    "qwen3_vl_30b_a3b": ("qwen3_vl_moe:qwen3_vl_30b_a3b", "Qwen3-VL 30B-A3B, images and video"),
    "qwen3_vl_32b": ("qwen3_vl:qwen3_vl_32b", "Qwen3-VL 32B, images and video"),
    "qwen3_vl_4b": ("qwen3_vl:qwen3_vl_4b", "Qwen3-VL 4B, images and video"),
    "qwen3_vl_8b": ("qwen3_vl:qwen3_vl_8b", "Qwen3-VL 8B, images and video"),
    "qwen3_vl_moe_tiny": (
        "tiny.qwen3_vl:qwen3_vl_moe_tiny",
        "Qwen3-VL of 0.3 million parameters, most of them in experts, on digits",
    ),
    "qwen3_vl_tiny": (
        "tiny.qwen3_vl:qwen3_vl_tiny",
        "Qwen3-VL of 0.2 million parameters, on digits in images and clips",
    ),
}

# Models of one family that differ in size alone have one twin; it answers to all their names.
_TWINS = {
    "gemma3_12b_tiny": "gemma3_tiny",
    "gemma3_27b_tiny": "gemma3_tiny",
    "gemma3_4b_tiny": "gemma3_tiny",
    "internvl3_5_14b_tiny": "internvl_tiny",
    "internvl3_5_1b_tiny": "internvl_tiny",
    "internvl3_5_30b_a3b_tiny": "internvl_tiny",
    "internvl3_5_38b_tiny": "internvl_tiny",
    "internvl3_5_8b_tiny": "internvl_tiny",
    "internvl3_8b_tiny": "internvl_tiny",
    "llava_1_5_13b_tiny": "llava_tiny",
    "llava_1_5_7b_tiny": "llava_tiny",
    "qwen2_5_vl_3b_tiny": "qwen2_5_vl_tiny",
    "qwen2_5_vl_7b_tiny": "qwen2_5_vl_tiny",
    "qwen2_audio_7b_tiny": "qwen2_audio_tiny",
    "qwen3_5_27b_tiny": "qwen3_5_tiny",
    "qwen3_5_35b_a3b_tiny": "qwen3_5_moe_tiny",
    "qwen3_5_4b_tiny": "qwen3_5_tiny",
    "qwen3_5_9b_tiny": "qwen3_5_tiny",
    "qwen3_vl_235b_a22b_tiny": "qwen3_vl_moe_tiny",
    "qwen3_vl_2b_tiny": "qwen3_vl_tiny",
    "qwen3_vl_30b_a3b_tiny": "qwen3_vl_moe_tiny",
    "qwen3_vl_32b_tiny": "qwen3_vl_tiny",
    "qwen3_vl_4b_tiny": "qwen3_vl_tiny",
    "qwen3_vl_8b_tiny": "qwen3_vl_tiny",
}


def recipe_names() -> tuple[str, ...]:
    """The names ``load_recipe`` knows, sorted."""
    return tuple(sorted(_RECIPES))


def recipe_summaries() -> dict[str, str]:
    """One line for each name."""
    return {name: _RECIPES[name][1] for name in recipe_names()}


def locate_recipe(name: str) -> str:
    """Where a recipe is, as ``package.module:function``; imports nothing.

    Args:
        name: one of ``recipe_names()``, a recipe's name with ``_tiny`` behind it, or the import
            path itself, which is returned as it is.

    Raises:
        ConfigError: the name is unknown.
    """
    if ":" in name:
        return name
    name = _TWINS.get(name, name)
    if name not in _RECIPES:
        near = difflib.get_close_matches(name, _RECIPES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise _error(
            f"unknown recipe {name!r}; {hint}known recipes: {', '.join(recipe_names())}; "
            "a recipe of your own is given as package.module:function"
        )
    return f"{__name__}.{_RECIPES[name][0]}"


def load_recipe(name: str) -> Recipe:
    """Load a recipe by its name, or from ``package.module:function``.

    Args:
        name: what ``locate_recipe`` takes; the function has no arguments and returns a ``Recipe``.

    Raises:
        ConfigError: the name is unknown, the module cannot be imported or has no such function.
    """
    module_name, _, function_name = locate_recipe(name).partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise _error(
            f"recipe {name!r}: cannot import {module_name!r}: no module named {error.name!r}"
        ) from error
    function = getattr(module, function_name, None)
    if function is None:
        raise _error(f"recipe {name!r}: module {module_name!r} has no {function_name!r}")
    recipe: Recipe = function()
    return recipe


def _error(message: str) -> Exception:
    from megatron.core.models.mimo.errors import ConfigError  # its package is Megatron's

    return ConfigError(message)
