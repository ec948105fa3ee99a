"""Language models of the LLaMA kind (LLaMA, Mistral, Qwen2) as Megatron's GPTModel.

They differ from each other in biases, grouped queries, the kind of rotary embedding and whether
the output layer is the embedding; all of that stands in their Hugging Face configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.core.models.mimo.errors import UnsupportedError
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.mimo.layers import language_layer_spec
from megatron.mimo.models.common.keys import Concatenated, FusedQKV, KeyEntry, PaddedVocabulary
from megatron.mimo.models.common.place import Place
from megatron.mimo.models.common.settings import LanguageSettings
from megatron.mimo.models.common.vocabulary import UnpaddedGPT

__all__ = ["ROTARY_BUFFERS", "language_arguments", "language_entries", "language_spec"]

ROTARY_BUFFERS = ("*.rotary_emb.inv_freq", "*.rotary_pos_emb.inv_freq")
"""Patterns of what old versions of transformers wrote beside weights, and none of them reads."""

_KINDS = ("llama", "mistral", "qwen2", "qwen2_5_vl_text")
# Kinds whose projections of queries, keys and values have biases, whatever their configuration.
_WITH_QKV_BIAS = ("qwen2", "qwen2_5_vl_text")
# Kinds whose rotary embeddings have three axes. Others read no mrope_section, also where one is.
_WITH_MROPE = ("qwen2_5_vl_text",)
_MROPE_SECTION = (16, 24, 24)  # what transformers takes where none is given
# Kinds whose heads have the size that hidden size and number of heads give, and no other.
_WITHOUT_HEAD_DIM = ("qwen2_5_vl_text",)
# Where windows are: nowhere, in the layers that a list names, or in all.
_WITHOUT_WINDOWS, _WITH_LAYER_TYPES = ("llama",), ("qwen2", "qwen2_5_vl_text")


def language_arguments(text: Any) -> dict[str, object]:
    """Megatron's arguments for a language model.

    Args:
        text: its Hugging Face configuration (``LlamaConfig``, ``MistralConfig``, ``Qwen2Config``,
            ``Qwen2_5_VLTextConfig``).

    Returns:
        Values by argparse destination. ``seq_length`` and everything about training are left to
        the recipe.

    Raises:
        UnsupportedError: the configuration asks for what this language model does not have.
    """
    _refuse_unsupported(text)
    arguments: dict[str, object] = {
        "num_layers": text.num_hidden_layers,
        "hidden_size": text.hidden_size,
        "ffn_hidden_size": text.intermediate_size,
        "num_attention_heads": text.num_attention_heads,
        "group_query_attention": True,
        "num_query_groups": text.num_key_value_heads,
        "kv_channels": _head_size(text),
        "normalization": "RMSNorm",
        "layernorm_epsilon": text.rms_norm_eps,
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": _has_qkv_bias(text),
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
    rope = text.rope_parameters
    if rope["rope_type"] == "llama3":
        arguments |= {"use_rope_scaling": True, "rope_scaling_factor": rope["factor"]}
    if text.model_type in _WITH_MROPE:
        arguments |= {"position_embedding_type": "mrope", "mrope_section": _mrope_section(text)}
    return arguments


def language_spec(settings: LanguageSettings, place: Place) -> ModuleSpec:
    """The GPTModel, for ``MimoModelConfig.language_model_spec``.

    Args:
        settings: what it is built of.
        place: of the language model.
    """
    config = settings.transformer
    scaling = settings.rope_scaling_factor
    return ModuleSpec(
        module=UnpaddedGPT,
        params={
            "tokens": settings.tokens,
            "config": config,
            "transformer_layer_spec": language_layer_spec(config, vp_stage=place.chunk),
            "vocab_size": settings.padded_tokens,
            "max_sequence_length": settings.max_positions,
            "pre_process": place.is_first_stage,
            "post_process": place.is_last_stage,
            "vp_stage": place.chunk,
            "pg_collection": place.groups,
            "position_embedding_type": settings.position_embedding,
            "rotary_percent": settings.rotary_percent,
            "rotary_base": settings.rotary_base,
            "rope_scaling": scaling is not None,
            **({} if scaling is None else {"rope_scaling_factor": scaling}),
            "share_embeddings_and_output_weights": settings.ties_output,
            "scatter_embedding_sequence_parallel": False,
        },
    )


def language_entries(text: Any, *, model: str, head: str) -> tuple[KeyEntry, ...]:
    """Parameter names of a language model.

    Args:
        text: its Hugging Face configuration.
        model: Hugging Face's prefix of its layers, such as "language_model.model.".
        head: Hugging Face's prefix of its output layer, such as "language_model.".
    """
    ours, theirs = "language_model.decoder.layers.{i}.", model + "layers.{i}."
    qkv = FusedQKV(
        heads=text.num_attention_heads,
        groups=text.num_key_value_heads,
        head_size=_head_size(text),
    )
    layers = range(text.num_hidden_layers)
    vocabulary = PaddedVocabulary(text.vocab_size)

    def row(mimo: str, *hf: str, **given: Any) -> KeyEntry:
        names = tuple(theirs + name for name in hf)
        return KeyEntry(mimo=ours + mimo, hf=names, layers=layers, **given)

    def projections(kind: str) -> tuple[str, ...]:
        return tuple(f"self_attn.{name}_proj.{kind}" for name in "qkv")

    embedding = "language_model.embedding.word_embeddings.weight"
    rows = [
        KeyEntry(mimo=embedding, hf=(model + "embed_tokens.weight",), transform=vocabulary),
        row("input_layernorm.weight", "input_layernorm.weight"),
        row("self_attention.linear_qkv.weight", *projections("weight"), transform=qkv),
        row("self_attention.linear_proj.weight", "self_attn.o_proj.weight"),
        row("pre_mlp_layernorm.weight", "post_attention_layernorm.weight"),
        row(
            "mlp.linear_fc1.weight",
            "mlp.gate_proj.weight",
            "mlp.up_proj.weight",
            transform=Concatenated(2),
        ),
        row("mlp.linear_fc2.weight", "mlp.down_proj.weight"),
        KeyEntry(mimo="language_model.decoder.final_layernorm.weight", hf=(model + "norm.weight",)),
    ]
    if _has_qkv_bias(text):
        rows.append(row("self_attention.linear_qkv.bias", *projections("bias"), transform=qkv))
    if not text.tie_word_embeddings:
        output = "language_model.output_layer.weight"
        rows.append(KeyEntry(mimo=output, hf=(head + "lm_head.weight",), transform=vocabulary))
    return tuple(rows)


def _head_size(text: Any) -> int:
    given: int | None = getattr(text, "head_dim", None)
    return given or text.hidden_size // text.num_attention_heads


def _number(value: float) -> int | float:
    """The same number, whole where it is: Megatron prints and compares whole bases."""
    return int(value) if value == int(value) else value


def _mrope_section(text: Any) -> list[int]:
    """How many frequencies of a head turn with time, height and width."""
    return list(text.rope_parameters.get("mrope_section") or _MROPE_SECTION)


def _has_qkv_bias(text: Any) -> bool:
    return text.model_type in _WITH_QKV_BIAS


def _refuse(name: str, got: object, expected: str) -> None:
    raise UnsupportedError(
        f"the language model's {name} is {got!r}; expected {expected}. "
        "docs/adding_a_model.md says how to add a family"
    )


def _refuse_unsupported(text: Any) -> None:
    if text.model_type not in _KINDS:
        _refuse("model_type", text.model_type, f"one of {', '.join(_KINDS)}")
    if text.hidden_act not in ("silu", "swish"):
        _refuse("hidden_act", text.hidden_act, "'silu'")
    derived = text.hidden_size // text.num_attention_heads
    if text.model_type in _WITHOUT_HEAD_DIM and _head_size(text) != derived:
        _refuse("head_dim", text.head_dim, f"{derived}, hidden_size / num_attention_heads")
    _refuse_rope(text, text.rope_parameters)
    for name in ("attention_bias", "mlp_bias"):
        if getattr(text, name, False):
            _refuse(name, True, "False")
    if text.model_type not in _WITHOUT_WINDOWS:
        _refuse_windows(text)


def _refuse_rope(text: Any, rope: Mapping[str, Any]) -> None:
    kinds = ("default",) if text.model_type in _WITH_MROPE else ("default", "llama3")
    if rope.get("rope_type") not in kinds:
        _refuse("rope_type", rope.get("rope_type"), " or ".join(map(repr, kinds)))
    if rope["rope_type"] == "llama3":
        fixed = {
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "partial_rotary_factor": 1.0,  # which the default kind does not read
        }
        for name, value in fixed.items():
            if rope.get(name, value) != value:
                _refuse(name, rope[name], f"{value}, which megatron-core has built in")
    if text.model_type in _WITH_MROPE:
        section, half = _mrope_section(text), _head_size(text) // 2
        if len(section) != 3 or sum(section) != half:
            _refuse("mrope_section", section, f"three numbers with the sum {half}, half a head")


def _refuse_windows(text: Any) -> None:
    """Attention in windows that are shorter than the longest text."""
    window = getattr(text, "sliding_window", None)
    kinds = text.layer_types if text.model_type in _WITH_LAYER_TYPES else ()
    slides = any(kind != "full_attention" for kind in kinds) if kinds else window is not None
    if not slides:
        return
    if window is None:
        _refuse("layer_types", sorted(set(kinds)), "'full_attention' without sliding_window")
    elif window < text.max_position_embeddings:
        _refuse(
            "sliding_window", window, f"None, or {text.max_position_embeddings} positions or more"
        )
