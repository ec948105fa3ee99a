"""From the Hugging Face configuration of a language model to Megatron's arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.mimo.models.common.language.kinds import (
    LanguageKind,
    expert_layers,
    head_size,
    kind_of,
    refuse,
    sums_to_one,
)

__all__ = ["language_arguments"]


def language_arguments(text: Any) -> dict[str, object]:
    """Megatron's arguments for a language model.

    Args:
        text: its Hugging Face configuration (``LlamaConfig``, ``MistralConfig``, ``Qwen2Config``,
            ``Qwen2_5_VLTextConfig``, ``Qwen3Config``, ``Qwen3MoeConfig``).

    Returns:
        Values by argparse destination. ``seq_length`` and everything about training are left to
        the recipe.

    Raises:
        UnsupportedError: the configuration asks for what this language model does not have.
    """
    kind = kind_of(text)
    _refuse_unsupported(text, kind)
    arguments: dict[str, object] = {
        "num_layers": text.num_hidden_layers,
        "hidden_size": text.hidden_size,
        "ffn_hidden_size": text.intermediate_size,
        "num_attention_heads": text.num_attention_heads,
        "group_query_attention": True,
        "num_query_groups": text.num_key_value_heads,
        "kv_channels": head_size(text),
        "normalization": "RMSNorm",
        "layernorm_epsilon": text.rms_norm_eps,
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": kind.qkv_bias,
        "qk_layernorm": kind.qk_norms,
        "position_embedding_type": "rope",
        "rotary_base": _number(text.rope_parameters["rope_theta"]),
        "rotary_percent": 1.0,
        "untie_embeddings_and_output_weights": not text.tie_word_embeddings,
        "vocab_size": text.vocab_size,
        "make_vocab_size_divisible_by": 128 if text.vocab_size >= 10_000 else 8,
        "max_position_embeddings": text.max_position_embeddings,
        "hidden_dropout": 0.0,
        "attention_dropout": text.attention_dropout,
        "init_method_std": text.initializer_range,
    }
    if kind.experts:
        arguments |= _of_experts(text)
    rope = text.rope_parameters
    if rope["rope_type"] == "llama3":
        arguments |= {"use_rope_scaling": True, "rope_scaling_factor": rope["factor"]}
    if kind.mrope:
        arguments |= {"position_embedding_type": "mrope", "mrope_section": _section(text, kind)}
    return arguments


def _of_experts(text: Any) -> dict[str, object]:
    """Softmax over all experts, then the best of them, whose weights may be made to sum to one.

    The best of a softmax, divided by their sum, are the softmax of the best, which is what Megatron
    computes without ``moe_router_pre_softmax``.
    """
    layers = expert_layers(text)
    if not layers:
        return {}
    return {
        "num_experts": text.num_experts,
        "moe_layer_freq": [int(layer in layers) for layer in range(text.num_hidden_layers)],
        "moe_ffn_hidden_size": text.moe_intermediate_size,
        "moe_router_topk": text.num_experts_per_tok,
        "moe_router_pre_softmax": not sums_to_one(text),
        "moe_router_load_balancing_type": "none",
    }


def _number(value: float) -> int | float:
    """The same number, whole where it is: Megatron prints and compares whole bases."""
    return int(value) if value == int(value) else value


def _section(text: Any, kind: LanguageKind) -> list[int]:
    """How many frequencies of a head turn with time, height and width."""
    return list(text.rope_parameters.get("mrope_section") or kind.mrope or ())


def _refuse_unsupported(text: Any, kind: LanguageKind) -> None:
    if text.hidden_act not in ("silu", "swish"):
        refuse("hidden_act", text.hidden_act, "'silu'")
    derived = text.hidden_size // text.num_attention_heads
    if not kind.reads_head_dim and head_size(text) != derived:
        refuse("head_dim", text.head_dim, f"{derived}, hidden_size / num_attention_heads")
    _refuse_rope(text, kind, text.rope_parameters)
    for name in ("attention_bias", "mlp_bias"):
        if getattr(text, name, False):
            refuse(name, True, "False")
    if kind.experts and text.num_experts_per_tok == 1 and sums_to_one(text):
        refuse("norm_topk_prob", True, "False where num_experts_per_tok is 1: it is always one")
    if kind.windows != "none":
        _refuse_windows(text, kind)


def _refuse_rope(text: Any, kind: LanguageKind, rope: Mapping[str, Any]) -> None:
    kinds = ("default",) if kind.mrope else ("default", "llama3")
    if rope.get("rope_type") not in kinds:
        refuse("rope_type", rope.get("rope_type"), " or ".join(map(repr, kinds)))
    if rope["rope_type"] == "llama3":
        fixed = {
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "partial_rotary_factor": 1.0,  # which the default kind does not read
        }
        for name, value in fixed.items():
            if rope.get(name, value) != value:
                refuse(name, rope[name], f"{value}, which megatron-core has built in")
    if kind.mrope:
        section, half = _section(text, kind), head_size(text) // 2
        if len(section) != 3 or sum(section) != half:
            refuse("mrope_section", section, f"three numbers with the sum {half}, half a head")


def _refuse_windows(text: Any, kind: LanguageKind) -> None:
    """Attention in windows that are shorter than the longest text."""
    window = getattr(text, "sliding_window", None)
    kinds = text.layer_types if kind.windows == "layer_types" else ()
    slides = any(one != "full_attention" for one in kinds) if kinds else window is not None
    if not slides:
        return
    if window is None:
        refuse("layer_types", sorted(set(kinds)), "'full_attention' without sliding_window")
    elif window < text.max_position_embeddings:
        refuse(
            "sliding_window", window, f"None, or {text.max_position_embeddings} positions or more"
        )
