"""Which parameter of a language model is which weight of transformers."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, Literal

from megatron.mimo.models.common.keys import (
    Concatenated,
    FusedQKV,
    KeyEntry,
    PaddedVocabulary,
    Same,
    Transposed,
)
from megatron.mimo.models.common.language.kinds import (
    expert_layers,
    has_bias,
    has_qkv_bias,
    head_size,
    kind_of,
    linear_layers,
)
from megatron.mimo.models.common.language.linear_entries import linear_entries

__all__ = ["ROTARY_BUFFERS", "language_entries"]

ROTARY_BUFFERS = ("*.rotary_emb.inv_freq", "*.rotary_pos_emb.inv_freq")
"""Patterns of what old versions of transformers wrote beside weights, and none of them reads."""

_OURS = "language_model.decoder.layers.{i}."


Stored = Literal["single", "stacked", "transposed"]
"""How files hold experts: one by one; or those of a layer in one weight, as transformers computes
with them, or with the last two axes exchanged."""


def language_entries(
    text: Any, *, model: str, head: str, experts: Stored = "single"
) -> tuple[KeyEntry, ...]:
    """Parameter names of a language model.

    Args:
        text: its Hugging Face configuration.
        model: Hugging Face's prefix of its layers, such as "language_model.model.".
        head: Hugging Face's prefix of its output layer, such as "language_model.".
        experts: how ``save_pretrained`` writes experts; the other ways are read too.
    """
    theirs = model + "layers.{i}."
    layers = range(text.num_hidden_layers)
    vocabulary = PaddedVocabulary(text.vocab_size)

    def entry(mimo: str, *hf: str, **given: Any) -> KeyEntry:
        names = tuple(theirs + name for name in hf)
        return KeyEntry(mimo=_OURS + mimo, hf=names, **{"layers": layers, **given})

    embedding = "language_model.embedding.word_embeddings.weight"
    entries = [
        KeyEntry(mimo=embedding, hf=(model + "embed_tokens.weight",), transform=vocabulary),
        entry("input_layernorm.weight", "input_layernorm.weight"),
        *_attention_entries(text, entry),
        *linear_entries(text, entry),
        *_norm_entries(text, entry),
        *_feed_forward_entries(text, entry, experts),
        KeyEntry(mimo="language_model.decoder.final_layernorm.weight", hf=(model + "norm.weight",)),
    ]
    if not text.tie_word_embeddings:
        output = "language_model.output_layer.weight"
        entries.append(KeyEntry(mimo=output, hf=(head + "lm_head.weight",), transform=vocabulary))
    return tuple(entries)


def _norm_entries(text: Any, entry: Any) -> list[KeyEntry]:
    """Entries of the norms around the feed-forward."""
    if not kind_of(text).sandwich_norms:
        return [entry("pre_mlp_layernorm.weight", "post_attention_layernorm.weight")]
    return [
        entry("post_self_attn_layernorm.weight", "post_attention_layernorm.weight"),
        entry("pre_mlp_layernorm.weight", "pre_feedforward_layernorm.weight"),
        entry("post_mlp_layernorm.weight", "post_feedforward_layernorm.weight"),
    ]


def _feed_forward_entries(text: Any, entry: Any, stored: Stored) -> list[KeyEntry]:
    """Entries of dense layers, and of the router and the experts of the others."""
    sparse = expert_layers(text)
    dense = [layer for layer in range(text.num_hidden_layers) if layer not in sparse]
    entries = []
    if dense:
        gate_up = ("mlp.gate_proj.weight", "mlp.up_proj.weight")
        entries += [
            entry("mlp.linear_fc1.weight", *gate_up, transform=Concatenated(2), layers=dense),
            entry("mlp.linear_fc2.weight", "mlp.down_proj.weight", layers=dense),
        ]
    if dense and has_bias(text, "mlp_bias"):
        gate_up = ("mlp.gate_proj.bias", "mlp.up_proj.bias")
        entries += [
            entry("mlp.linear_fc1.bias", *gate_up, transform=Concatenated(2), layers=dense),
            entry("mlp.linear_fc2.bias", "mlp.down_proj.bias", layers=dense),
        ]
    if sparse:
        hidden, inner = text.hidden_size, text.moe_intermediate_size
        entries += [
            entry("mlp.router.weight", "mlp.gate.weight", layers=sparse),
            *_shared_expert_entries(text, entry),
            _expert_entry(text, entry, stored, 1, ("gate", "up"), (2 * inner, hidden)),
            _expert_entry(text, entry, stored, 2, ("down",), (hidden, inner)),
        ]
    return entries


def _shared_expert_entries(text: Any, entry: Any) -> list[KeyEntry]:
    """The expert that sees every token, and its gate."""
    if not kind_of(text).shared_expert:
        return []
    ours, theirs, layers = "mlp.shared_experts.", "mlp.shared_expert", expert_layers(text)
    gate_up = (f"{theirs}.gate_proj.weight", f"{theirs}.up_proj.weight")
    return [
        entry(f"{ours}linear_fc1.weight", *gate_up, transform=Concatenated(2), layers=layers),
        entry(f"{ours}linear_fc2.weight", f"{theirs}.down_proj.weight", layers=layers),
        entry(f"{ours}gate_weight", f"{theirs}_gate.weight", layers=layers),
    ]


def _expert_entry(
    text: Any,
    entry: Any,
    stored: Stored,
    number: int,
    names: tuple[str, ...],
    shape: tuple[int, int],
) -> KeyEntry:
    """The entry of a layer of every expert; ``shape`` is [O, I] of an expert's weights together."""
    ours = f"mlp.experts.local_experts.{{e}}.linear_fc{number}.weight"
    given = {"layers": expert_layers(text), "experts": range(text.num_experts)}
    single = [f"mlp.experts.{{e}}.{name}_proj.weight" for name in names]
    together = f"mlp.experts.{'_'.join(names)}_proj[{{e}}]"
    joined = Concatenated(len(names)) if len(names) > 1 else Same()
    ways = {
        "single": entry(ours, *single, transform=joined, **given),
        "stacked": entry(ours, together, shape=shape, **given),
        "transposed": entry(ours, together, shape=shape[::-1], transform=Transposed(), **given),
    }
    return replace(ways[stored], others=tuple(ways.values()))


def _attention_entries(text: Any, entry: Any) -> list[KeyEntry]:
    """Entries of the attention of every layer; ``entry(mimo, *hf, transform=)`` makes one."""
    kind, linear = kind_of(text), linear_layers(text)
    qkv = FusedQKV(
        heads=text.num_attention_heads,
        groups=text.num_key_value_heads,
        head_size=head_size(text),
        gated=kind.output_gate,
    )
    if linear:
        full = [layer for layer in range(text.num_hidden_layers) if layer not in linear]
        entry = partial(entry, layers=full)

    def projections(what: str) -> tuple[str, ...]:
        return tuple(f"self_attn.{name}_proj.{what}" for name in "qkv")

    entries = [
        entry("self_attention.linear_qkv.weight", *projections("weight"), transform=qkv),
        entry("self_attention.linear_proj.weight", "self_attn.o_proj.weight"),
    ]
    if has_bias(text, "attention_bias"):
        entries.append(entry("self_attention.linear_proj.bias", "self_attn.o_proj.bias"))
    if has_qkv_bias(text):
        entries.append(entry("self_attention.linear_qkv.bias", *projections("bias"), transform=qkv))
    if kind.qk_norms:
        entries += [
            entry(f"self_attention.{name}_layernorm.weight", f"self_attn.{name}_norm.weight")
            for name in "qk"
        ]
    return entries
