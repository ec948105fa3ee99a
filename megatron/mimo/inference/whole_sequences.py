"""Whole sequences on every rank, of any length, in a model that was built for training's.

A step of generation has one token for each sequence, which neither sequence nor context
parallelism can cut, nor can FP8's matrix products take it: they want tokens by the eight. Their
weights are whole on every rank that shares a sequence (or cut by
tensor parallelism alone), so that the same model runs uncut: the ranks of a context-parallel group
then do the same work.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from megatron.core.models.mimo import MimoModel

__all__ = ["whole_sequences"]

_FLAGS = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")


@contextmanager
def whole_sequences(chunks: Sequence[MimoModel]) -> Iterator[None]:
    """Switch sequence and context parallelism and FP8 off for the time of the block.

    Args:
        chunks: this rank's; every rank of the sequence's groups enters with its own.
    """
    undo: list[tuple[Any, str, Any]] = []
    te_layers: list[tuple[Any, Any]] = []

    def put(owner: Any, name: str, value: Any) -> None:
        undo.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    rotary = [
        module
        for chunk in chunks
        for module in chunk.language_model.modules()
        if hasattr(module, "inv_freq")
    ]
    for config in {id(c.config): c.config for c in _with_low_precision(chunks)}.values():
        put(config, "fp8", None)
        put(config, "fp4", None)
    cut = any(chunk.partition_adapter is not None for chunk in chunks)
    if cut:
        for chunk in chunks:
            put(chunk, "partition_adapter", None)
            for module in chunk.language_model.modules():
                _make_whole(module, put, te_layers)
        _forget_rotations(rotary)
    try:
        yield
    finally:
        for owner, name, value in reversed(undo):
            setattr(owner, name, value)
        for layer, groups in te_layers:
            layer.set_context_parallel_group(*groups)
        if cut:
            _forget_rotations(rotary)


def _with_low_precision(chunks: Sequence[MimoModel]) -> Iterator[Any]:
    for chunk in chunks:
        for module in chunk.language_model.modules():
            config = getattr(module, "config", None)
            if getattr(config, "fp8", None) or getattr(config, "fp4", None):
                yield module


def _make_whole(module: Any, put: Any, te_layers: list[tuple[Any, Any]]) -> None:
    for name in _FLAGS:
        if getattr(module, name, None) is True:
            put(module, name, False)
    config = getattr(module, "config", None)
    if getattr(config, "sequence_parallel", False):
        put(config, "sequence_parallel", False)
    if getattr(config, "context_parallel_size", 1) > 1:
        put(config, "context_parallel_size", 1)
    if hasattr(module, "set_context_parallel_group"):  # Transformer Engine's attention
        if getattr(module, "cp_group", None) is not None:
            names = ("cp_group", "cp_global_ranks", "cp_stream", "cp_comm_type")
            te_layers.append((module, [getattr(module, name) for name in names]))
            module.set_context_parallel_group(None, None, None)
    elif getattr(module, "cp_group", None) is not None:  # CoreAttention, rotary embeddings
        put(module, "cp_group", None)


def _forget_rotations(rotary: Sequence[nn.Module]) -> None:
    """Rotary embeddings remember what they returned, not how it was cut."""
    for kind in {type(module) for module in rotary}:
        clear = getattr(kind.forward, "cache_clear", None)
        if clear is not None:
            clear()
