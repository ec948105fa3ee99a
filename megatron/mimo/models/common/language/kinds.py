"""Kinds of language models by ``model_type``: what each has, whatever its configuration says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from megatron.core.models.mimo.errors import UnsupportedError

__all__ = [
    "KINDS",
    "LanguageKind",
    "expert_layers",
    "has_bias",
    "has_qkv_bias",
    "head_size",
    "kind_of",
    "linear_layers",
    "refuse",
    "rotary_size",
    "sums_to_one",
    "window_layers",
]


@dataclass(frozen=True, kw_only=True)
class LanguageKind:
    """A ``model_type`` of transformers.

    Attributes:
        qkv_bias: projections of queries, keys and values have biases.
        qk_norms: queries and keys are normed, head by head, before they are rotated.
        mrope: positions have three axes; how many frequencies of a head belong to each where the
            configuration does not say. Other kinds ignore an mrope_section.
        reads_head_dim: the configuration may give heads another size than hidden size and number
            of heads do.
        experts: layers may be mixtures of experts, with weights of their own size.
        reads_norm_topk: the configuration says whether the weights of a token's experts are made
            to sum to one; others always do it.
        biases: ``attention_bias`` and ``mlp_bias``, those of both that the kind reads.
        zero_centered: norms multiply by 1 + weight.
        sandwich_norms: what attention and feed-forward add is normed before it is added.
        gelu: the feed-forward's activation is the tanh approximation of GELU, not SiLU.
        scales_embedding: by the root of the hidden size.
        rope_by_layer_type: ``rope_parameters`` has an entry for each type of layers.
        windows: where attention slides: in no layer, in all of them, or in those that
            ``layer_types`` names.
        linear: the layers that ``layer_types`` calls "linear_attention" have a gated delta net in
            place of attention.
        output_gate: what attention gives is multiplied by a sigmoid, for which the projection of
            queries has a second half.
        partial_rotary: only a share of a head's features is rotated, ``partial_rotary_factor``.
        shared_expert: beside the experts that are chosen one sees every token, behind a gate.
    """

    qkv_bias: bool = False
    qk_norms: bool = False
    mrope: tuple[int, int, int] | None = None
    reads_head_dim: bool = True
    experts: bool = False
    reads_norm_topk: bool = True
    biases: tuple[str, ...] = ()
    zero_centered: bool = False
    sandwich_norms: bool = False
    gelu: bool = False
    scales_embedding: bool = False
    rope_by_layer_type: bool = False
    windows: Literal["none", "all", "layer_types"] = "none"
    linear: bool = False
    output_gate: bool = False
    partial_rotary: bool = False
    shared_expert: bool = False


_ATTENTION = ("attention_bias",)
_QWEN3_5: dict[str, Any] = {
    "qk_norms": True,
    "biases": _ATTENTION,
    "zero_centered": True,
    "mrope": (11, 11, 10),
    "linear": True,
    "output_gate": True,
    "partial_rotary": True,
}

KINDS: dict[str, LanguageKind] = {
    "llama": LanguageKind(biases=("attention_bias", "mlp_bias")),
    "mistral": LanguageKind(windows="all"),
    "qwen2": LanguageKind(qkv_bias=True, windows="layer_types"),
    "qwen2_5_vl_text": LanguageKind(
        qkv_bias=True, mrope=(16, 24, 24), reads_head_dim=False, windows="layer_types"
    ),
    "qwen3": LanguageKind(qk_norms=True, biases=_ATTENTION, windows="layer_types"),
    "qwen3_moe": LanguageKind(qk_norms=True, experts=True, biases=_ATTENTION, windows="all"),
    "qwen3_vl_text": LanguageKind(qk_norms=True, biases=_ATTENTION, mrope=(24, 20, 20)),
    "qwen3_vl_moe_text": LanguageKind(
        qk_norms=True,
        biases=_ATTENTION,
        experts=True,
        reads_norm_topk=False,
        mrope=(24, 20, 20),
    ),
    "gemma3_text": LanguageKind(
        qk_norms=True,
        biases=_ATTENTION,
        zero_centered=True,
        sandwich_norms=True,
        gelu=True,
        scales_embedding=True,
        rope_by_layer_type=True,
        windows="layer_types",
    ),
    "qwen3_5_text": LanguageKind(**_QWEN3_5),
    "qwen3_5_moe_text": LanguageKind(
        experts=True, reads_norm_topk=False, shared_expert=True, **_QWEN3_5
    ),
}


def kind_of(text: Any) -> LanguageKind:
    """The kind of a configuration.

    Raises:
        UnsupportedError: its ``model_type`` is none of those here.
    """
    if text.model_type not in KINDS:
        refuse("model_type", text.model_type, f"one of {', '.join(KINDS)}")
    return KINDS[text.model_type]


def head_size(text: Any) -> int:
    """Features of a head."""
    given: int | None = getattr(text, "head_dim", None)
    return given or text.hidden_size // text.num_attention_heads


def rotary_size(text: Any) -> int:
    """Features of a head that are rotated."""
    if not kind_of(text).partial_rotary:
        return head_size(text)
    return int(head_size(text) * text.rope_parameters.get("partial_rotary_factor", 1.0))


def has_bias(text: Any, name: str) -> bool:
    """Whether ``attention_bias`` or ``mlp_bias`` is read by the kind, and set."""
    return name in kind_of(text).biases and bool(getattr(text, name, False))


def has_qkv_bias(text: Any) -> bool:
    """Whether the projections of queries, keys and values have biases."""
    return kind_of(text).qkv_bias or has_bias(text, "attention_bias")


def window_layers(text: Any) -> tuple[bool, ...]:
    """For every layer, whether its attention slides in a window shorter than the longest text."""
    kind, layers = kind_of(text), text.num_hidden_layers
    window = getattr(text, "sliding_window", None)
    if kind.windows == "none" or window is None or window >= text.max_position_embeddings:
        return (False,) * layers
    if kind.windows == "all":
        return (True,) * layers
    return tuple(one == "sliding_attention" for one in text.layer_types)


def linear_layers(text: Any) -> tuple[int, ...]:
    """The layers with a gated delta net in place of attention."""
    if not kind_of(text).linear:
        return ()
    return tuple(i for i, one in enumerate(text.layer_types) if one == "linear_attention")


def expert_layers(text: Any) -> tuple[int, ...]:
    """The layers that are mixtures of experts."""
    if not kind_of(text).experts or not text.num_experts:
        return ()
    step = getattr(text, "decoder_sparse_step", 1)
    dense = getattr(text, "mlp_only_layers", ())
    layers = range(text.num_hidden_layers)
    return tuple(layer for layer in layers if (layer + 1) % step == 0 and layer not in dense)


def sums_to_one(text: Any) -> bool:
    """Whether the weights of a token's experts sum to one."""
    return not kind_of(text).reads_norm_topk or bool(text.norm_topk_prob)


def refuse(name: str, got: object, expected: str) -> None:
    """Raise ``UnsupportedError`` for a field of the language model's configuration."""
    raise UnsupportedError(
        f"the language model's {name} is {got!r}; expected {expected}. "
        "docs/adding_a_model.md says how to add a family"
    )
