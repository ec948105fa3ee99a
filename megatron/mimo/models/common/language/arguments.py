"""From the Hugging Face configuration of a language model to Megatron's arguments."""

from __future__ import annotations

import copy
from typing import Any

from megatron.mimo.models.common.language.kinds import (
    LanguageKind,
    expert_layers,
    has_bias,
    has_qkv_bias,
    head_size,
    kind_of,
    linear_layers,
    refuse,
    rotary_size,
    sums_to_one,
    window_layers,
)
from megatron.mimo.models.common.language.rope import check_rope, rope_by_layer

__all__ = ["language_arguments", "text_config"]


def text_config(config: Any) -> Any:
    """The language model's configuration, with its output layer tied as the whole model's says."""
    text = copy.copy(config.text_config)
    text.tie_word_embeddings = config.tie_word_embeddings
    return text


def language_arguments(text: Any) -> dict[str, object]:
    """Megatron's arguments for a language model.

    Args:
        text: its Hugging Face configuration (``LlamaConfig``, ``MistralConfig``, ``Qwen2Config``,
            ``Qwen2_5_VLTextConfig``, ``Qwen3Config``, ``Qwen3MoeConfig``, ``Gemma3TextConfig``,
            ``Qwen3_5TextConfig``, ``Qwen3_5MoeTextConfig``).

    Returns:
        Values by argparse destination. ``seq_length`` and everything about training are left to
        the recipe.

    Raises:
        UnsupportedError: the configuration asks for what this language model does not have.
    """
    kind = kind_of(text)
    _refuse_unsupported(text, kind)
    rope = text.rope_parameters
    rope = rope["full_attention"] if kind.rope_by_layer_type else rope
    arguments: dict[str, object] = {
        "num_layers": text.num_hidden_layers,
        "hidden_size": text.hidden_size,
        "ffn_hidden_size": _dense_width(text),
        "num_attention_heads": text.num_attention_heads,
        "group_query_attention": True,
        "num_query_groups": text.num_key_value_heads,
        "kv_channels": head_size(text),
        "normalization": "RMSNorm",
        "layernorm_epsilon": text.rms_norm_eps,
        "swiglu": True,
        "add_bias_linear": has_bias(text, "mlp_bias"),
        "add_qkv_bias": has_qkv_bias(text),
        "qk_layernorm": kind.qk_norms,
        "position_embedding_type": "rope",
        "rotary_base": _number(rope["rope_theta"]),
        "rotary_percent": rope.get("partial_rotary_factor", 1.0) if kind.partial_rotary else 1.0,
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
    if kind.zero_centered:
        arguments["layernorm_zero_centered_gamma"] = True
    if kind.output_gate:
        arguments["attention_output_gate"] = True
    if kind.linear:
        arguments |= _of_linear_layers(text)
    windows = window_layers(text)
    if any(windows):
        arguments |= {
            "window_size": (text.sliding_window - 1, 0),
            "window_attn_skip_freq": [int(slides) for slides in windows],
        }
    if rope["rope_type"] == "llama3":
        arguments |= {"use_rope_scaling": True, "rope_scaling_factor": rope["factor"]}
    if rope["rope_type"] == "yarn":  # the fused rotation knows no factor of sines and cosines
        arguments["apply_rope_fusion"] = False
    if kind.mrope:
        arguments |= {"position_embedding_type": "mrope", "mrope_section": _section(text, kind)}
    return arguments


def _dense_width(text: Any) -> int:
    """Of the feed-forward of dense layers; where there are none the experts' own, never built."""
    width: int = getattr(text, "intermediate_size", None) or text.moe_intermediate_size
    return width


def _of_linear_layers(text: Any) -> dict[str, object]:
    linear = linear_layers(text)
    return {
        "linear_attention_freq": [int(one in linear) for one in range(text.num_hidden_layers)],
        "linear_conv_kernel_dim": text.linear_conv_kernel_dim,
        "linear_key_head_dim": text.linear_key_head_dim,
        "linear_value_head_dim": text.linear_value_head_dim,
        "linear_num_key_heads": text.linear_num_key_heads,
        "linear_num_value_heads": text.linear_num_value_heads,
    }


def _of_experts(text: Any) -> dict[str, object]:
    """Arguments of layers with experts; none without such layers.

    A router takes the softmax over all experts, then the best of them, and may divide their
    weights by the sum. The result of the division is the softmax over the best alone, which is
    what Megatron computes without ``moe_router_pre_softmax``.

    The loss that balances experts is added where transformers adds it, with
    ``output_router_logits``, in place of Megatron's own.
    """
    layers = expert_layers(text)
    if not layers:
        return {}
    coefficient = text.router_aux_loss_coef if text.output_router_logits else 0.0
    shared: dict[str, object] = {}
    if kind_of(text).shared_expert:
        shared["moe_shared_expert_intermediate_size"] = text.shared_expert_intermediate_size
        shared["moe_shared_expert_gate"] = True
    return {
        **shared,
        "num_experts": text.num_experts,
        "moe_layer_freq": [int(layer in layers) for layer in range(text.num_hidden_layers)],
        "moe_ffn_hidden_size": text.moe_intermediate_size,
        "moe_router_topk": text.num_experts_per_tok,
        "moe_router_pre_softmax": not sums_to_one(text),
        "moe_aux_loss_coeff": 0.0,
        "router_aux_loss_coef": coefficient,
    }


def _number(value: float) -> int | float:
    """A number as an int where it is whole, as Megatron prints and compares RoPE's base."""
    return int(value) if value == int(value) else value


def _section(text: Any, kind: LanguageKind) -> list[int]:
    """How many frequencies of a head belong to time, height and width."""
    return list(text.rope_parameters.get("mrope_section") or kind.mrope or ())


def _refuse_unsupported(text: Any, kind: LanguageKind) -> None:
    if kind.gelu:
        _expect(text, "hidden_activation", ("gelu_pytorch_tanh",))
    else:
        _expect(text, "hidden_act", ("silu", "swish"))
    derived = text.hidden_size // text.num_attention_heads
    if not kind.reads_head_dim and head_size(text) != derived:
        refuse("head_dim", text.head_dim, f"{derived}, hidden_size / num_attention_heads")
    for rope in rope_by_layer(text)[0]:
        check_rope(text, rope)
    if kind.mrope:
        _check_section(text, kind)
    if kind.experts and text.num_experts_per_tok == 1 and sums_to_one(text):
        refuse("norm_topk_prob", True, "False where num_experts_per_tok is 1: it is always one")
    if kind.linear:
        _check_linear_layers(text)
    types = set(text.layer_types) if kind.windows == "layer_types" else set()
    if types - {"full_attention", "sliding_attention"}:
        refuse("layer_types", sorted(types), "'full_attention' and 'sliding_attention'")
    if "sliding_attention" in types and text.sliding_window is None:
        refuse("layer_types", sorted(types), "'full_attention' without sliding_window")
    if getattr(text, "use_bidirectional_attention", False):
        refuse("use_bidirectional_attention", True, "False: text is read from left to right")
    if getattr(text, "attn_logit_softcapping", None) is not None:
        refuse(
            "attn_logit_softcapping",
            text.attn_logit_softcapping,
            "None: its model in transformers takes no notice of it",
        )


def _check_section(text: Any, kind: LanguageKind) -> None:
    turning = rotary_size(text)
    if turning % 2 or not 0 < turning <= head_size(text):
        factor = text.rope_parameters.get("partial_rotary_factor")
        refuse(
            "partial_rotary_factor",
            factor,
            f"the share of the {head_size(text)} features of a head that turn, an even number",
        )
    section, half = _section(text, kind), turning // 2
    if len(section) != 3 or sum(section) != half:
        refuse("mrope_section", section, f"three numbers with the sum {half}, half of what turns")


def _check_linear_layers(text: Any) -> None:
    """Refuse kinds of layers that are none here, and what a class of transformers ignores."""
    types, layers = text.layer_types, text.num_hidden_layers
    if len(types) != layers or set(types) - {"full_attention", "linear_attention"}:
        refuse("layer_types", types, f"{layers} of 'full_attention' and 'linear_attention'")
    keys, values = text.linear_num_key_heads, text.linear_num_value_heads
    if keys < 1 or values % keys:
        refuse("linear_num_value_heads", values, f"a multiple of linear_num_key_heads, {keys}")
    # Published files say these; another value is another model, which no class of transformers has.
    known: dict[str, tuple[object, ...]] = {
        "attn_output_gate": (True,),
        "output_gate_type": ("swish", "silu"),
        "mamba_ssm_dtype": ("float32",),
        "mlp_only_layers": ([],),
        "decoder_sparse_step": (1,),
        "norm_topk_prob": (True,),
    }
    for name, allowed in known.items():
        given = getattr(text, name, allowed[0])
        if given not in allowed:
            refuse(name, given, " or ".join(map(repr, allowed)))


def _expect(text: Any, name: str, values: tuple[str, ...]) -> None:
    if getattr(text, name) not in values:
        refuse(name, getattr(text, name), repr(values[0]))
