"""The configurations of a family's card: its tiny one, and others drawn from its axes.

The same on every machine: the names of the family and of the axis are the seed.
"""

from __future__ import annotations

import random
from functools import partial
from typing import Any

__all__ = ["DRAWN", "change_of", "described", "draw"]

DRAWN = 4  # beside the tiny one
_ROPE: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 5000.0},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 3.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}
# What every language model's configuration has, and what each kind has besides.
_COMMON: dict[str, tuple[Any, ...]] = {
    "num_key_value_heads": (2, 4),
    "vocab_size": (401, 433, 499, 503),
    "rms_norm_eps": (1e-6, 1e-5),
}
_QWEN3_5: dict[str, tuple[Any, ...]] = {
    "rms_norm_eps": (1e-3, 1e-4),  # see the tiny configuration
    "attention_bias": (False, True),
    "layer_types": (
        ["linear_attention", "full_attention"] * 2,
        [*["linear_attention"] * 3, "full_attention"],
    ),
    "linear_num_key_heads": (2, 4),
    "linear_num_value_heads": (4, 8),
    "linear_conv_kernel_dim": (3, 4),
}
_OF_KIND: dict[str, dict[str, tuple[Any, ...]]] = {
    "llama": {
        "rope": tuple(_ROPE),
        "head_dim": (16, 24),
        "attention_bias": (False, True),
        "mlp_bias": (False, True),
    },
    "mistral": {"rope": tuple(_ROPE), "head_dim": (16, 24), "sliding_window": (None, 7)},
    "qwen2": {"rope": tuple(_ROPE), "window": (None, 6)},
    "qwen3": {
        "rope": tuple(_ROPE),
        "head_dim": (16, 24),
        "window": (None, 6),
        "attention_bias": (False, True),
    },
    "qwen3_moe": {
        "head_dim": (16, 24),
        "norm_topk_prob": (False, True),
        "num_experts_per_tok": (2, 3),
        "attention_bias": (False, True),
    },
    "qwen2_5_vl_text": {"window": (None, 6)},
    "qwen3_vl_text": {"attention_bias": (False, True)},
    "qwen3_vl_moe_text": {"attention_bias": (False, True), "num_experts_per_tok": (2, 3)},
    "qwen3_5_text": _QWEN3_5,
    "qwen3_5_moe_text": {**_QWEN3_5, "num_experts_per_tok": (2, 3)},
    "gemma3_text": {
        "head_dim": (16, 24),
        "sliding_window": (5, 9),
        "query_pre_attn_scalar": (16, 20),
    },
}
# Families that take several kinds of language models.
_LANGUAGES: dict[str, tuple[str, ...]] = {
    "llava": ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gemma3_text"),
    "llava_next": ("llama", "mistral", "qwen2", "qwen3"),
    "qwen2_audio": ("llama", "mistral", "qwen2"),
    "internvl": ("qwen2", "qwen3", "qwen3_moe"),
}
_LLAVA: dict[str, tuple[Any, ...]] = {
    "vision_feature_layer": (-1, -2, [0, -1]),
    "projector_hidden_act": ("gelu", "relu"),
    "multimodal_projector_bias": (True, False),
}
_OF_FAMILY: dict[str, dict[str, tuple[Any, ...]]] = {
    "llava": {**_LLAVA, "vision_feature_select_strategy": ("default", "full")},
    "llava_next": _LLAVA,
    "llava_avlm": _LLAVA,
    "internvl": {"vision_feature_layer": (-1, -2)},
    "qwen2_5_vl": {"vision fullatt_block_indexes": ([0], [1], [0, 2])},
    "qwen3_vl": {"vision deepstack_visual_indexes": ([0], [1, 2], [0, 1])},
    "qwen3_vl_moe": {"vision deepstack_visual_indexes": ([0], [1, 2], [0, 1])},
}
_TIED: dict[str, tuple[bool, ...]] = {"tie_word_embeddings": (False, True)}
# Whose whole model of transformers 5.24 has an output layer of its own in any case.
_NEVER_TIED = ("qwen2_audio",)


def draw(name: str, number: int) -> dict[str, Any]:
    """Values of the axes of a family's configuration; {} is the tiny one, number 0.

    Args:
        name: of the family.
        number: from 0 to ``DRAWN``.
    """
    from megatron.mimo.models import load_family

    if number == 0:
        return {}
    own = load_family(name).tiny().get_text_config().model_type
    kind = _choice(name, number, "language model", _LANGUAGES.get(name, (own,)))
    values: dict[str, Any] = {} if kind == own else {"language model": kind}
    axes = {**_COMMON, **_OF_KIND.get(kind, {}), **_OF_FAMILY.get(name, {})}
    if name not in _NEVER_TIED:
        axes |= _TIED
    return values | {axis: _choice(name, number, axis, choices) for axis, choices in axes.items()}


def _choice(name: str, number: int, axis: str, choices: tuple[Any, ...]) -> Any:
    """Each value of an axis stands in as many of the drawn configurations, as far as it goes."""
    drawn = list(choices)
    random.Random(f"{name}/{axis}").shuffle(drawn)
    dealt = [drawn[place % len(drawn)] for place in range(DRAWN)]
    random.Random(f"{axis}/{name}").shuffle(dealt)
    return dealt[number - 1]


def described(values: dict[str, Any]) -> str:
    """The values of a configuration's axes, for a table."""
    return ", ".join(f"{axis} {value}" for axis, value in values.items()) or "the family's own"


def change_of(name: str, number: int) -> partial[None]:
    """Makes a family's tiny configuration the one of this number, in place."""
    return partial(_change, name, number)


def _change(name: str, number: int, config: Any) -> None:
    values = draw(name, number)
    if not values:
        return
    content = config.to_dict()
    if "language model" in values:
        content["text_config"] = _language(values["language model"])
    text = content["text_config"]
    for axis, value in values.items():
        if axis == "language model":
            continue
        if axis.startswith("vision "):
            content["vision_config"][axis.removeprefix("vision ")] = value
        elif axis == "rope":
            text["rope_parameters"] = dict(_ROPE[value])
        elif axis == "window":
            text |= {
                "use_sliding_window": value is not None,
                "sliding_window": value,
                "max_window_layers": 1,
            }
            text.pop("layer_types", None)
        elif axis in _OF_FAMILY.get(name, {}):
            content[axis] = value
        else:
            text[axis] = value
    if "tie_word_embeddings" in values:
        content["tie_word_embeddings"] = values["tie_word_embeddings"]
    config.__dict__.update(type(config).from_dict(content).__dict__)


def _language(kind: str) -> dict[str, Any]:
    """A tiny language model of another kind than the family's tiny model has."""
    from transformers import AutoConfig

    from megatron.mimo.models.common.tiny import TINY_TEXT
    from tests.distributed.models.text_kinds import KINDS

    of_kind = {"gemma3_text": KINDS["gemma3"], "qwen3_moe": KINDS["qwen3_moe"]}.get(kind, {})
    content: dict[str, Any] = AutoConfig.for_model(
        **TINY_TEXT | of_kind | {"model_type": kind}
    ).to_dict()
    return content
