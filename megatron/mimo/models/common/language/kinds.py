"""Kinds of language models by ``model_type``: what each has, whatever its configuration says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from megatron.core.models.mimo.errors import UnsupportedError

__all__ = [
    "KINDS",
    "LanguageKind",
    "expert_layers",
    "head_size",
    "kind_of",
    "refuse",
    "sums_to_one",
]


@dataclass(frozen=True, kw_only=True)
class LanguageKind:
    """A ``model_type`` of transformers.

    Attributes:
        qkv_bias: projections of queries, keys and values have biases.
        qk_norms: queries and keys are normed, head by head, before they turn.
        mrope: positions have three axes; how many frequencies of a head turn with each where the
            configuration does not say. Others read no mrope_section, also where one is.
        reads_head_dim: the configuration may give heads another size than hidden size and number
            of heads do.
        experts: layers may be mixtures of experts, with weights of their own size.
        reads_norm_topk: the configuration says whether the weights of a token's experts are made
            to sum to one; others always do it.
        windows: where attention slides: in no layer, in all of them, or in those that
            ``layer_types`` names.
    """

    qkv_bias: bool = False
    qk_norms: bool = False
    mrope: tuple[int, int, int] | None = None
    reads_head_dim: bool = True
    experts: bool = False
    reads_norm_topk: bool = True
    windows: Literal["none", "all", "layer_types"] = "none"


KINDS: dict[str, LanguageKind] = {
    "llama": LanguageKind(),
    "mistral": LanguageKind(windows="all"),
    "qwen2": LanguageKind(qkv_bias=True, windows="layer_types"),
    "qwen2_5_vl_text": LanguageKind(
        qkv_bias=True, mrope=(16, 24, 24), reads_head_dim=False, windows="layer_types"
    ),
    "qwen3": LanguageKind(qk_norms=True, windows="layer_types"),
    "qwen3_moe": LanguageKind(qk_norms=True, experts=True, windows="all"),
    "qwen3_vl_text": LanguageKind(qk_norms=True, mrope=(24, 20, 20)),
    "qwen3_vl_moe_text": LanguageKind(
        qk_norms=True, experts=True, reads_norm_topk=False, mrope=(24, 20, 20)
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


def expert_layers(text: Any) -> tuple[int, ...]:
    """The layers that are mixtures of experts."""
    if not kind_of(text).experts or not text.num_experts:
        return ()
    step, dense = text.decoder_sparse_step, text.mlp_only_layers
    layers = range(text.num_hidden_layers)
    return tuple(layer for layer in layers if (layer + 1) % step == 0 and layer not in dense)


def sums_to_one(text: Any) -> bool:
    """The weights of the experts of a token do."""
    return not kind_of(text).reads_norm_topk or bool(text.norm_topk_prob)


def refuse(name: str, got: object, expected: str) -> None:
    """Raise: the language model's configuration asks for what is not here."""
    raise UnsupportedError(
        f"the language model's {name} is {got!r}; expected {expected}. "
        "docs/adding_a_model.md says how to add a family"
    )
