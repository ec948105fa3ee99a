"""Lets a model that was built for training run on whole sequences of any length.

A step of generation has one token for each sequence, which sequence and context parallelism cannot
cut, and which FP8's matrix products (tokens in multiples of eight) and CUDA graphs (training's
shapes) do not take. Weights are cut by tensor parallelism alone, so that the model can run without
the others: the ranks of a context-parallel group then all do the same work.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from megatron.core.models.mimo import MimoModel

__all__ = ["whole_sequences"]

_OFF: dict[str, object] = {"fp8": None, "fp4": None, "cuda_graph_impl": "none"}
_GRAPHS = "cudagraph_manager"
_FLAGS = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")


@contextmanager
def whole_sequences(chunks: Sequence[MimoModel]) -> Iterator[None]:
    """Switch sequence and context parallelism, FP8 and CUDA graphs off for the time of the block.

    Args:
        chunks: this rank's; every rank of the sequence's groups enters with its own.
    """
    undo: list[tuple[Any, str, Any]] = []
    te_layers: list[tuple[Any, Any]] = []

    def put(owner: Any, name: str, value: Any) -> None:
        undo.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    modules = [module for chunk in chunks for module in chunk.language_model.modules()]
    configs = [module.config for module in modules if hasattr(module, "config")]
    for config in {id(config): config for config in configs}.values():
        for name, off in _OFF.items():
            if getattr(config, name, off) != off:
                put(config, name, off)
    rotary = [module for module in modules if hasattr(module, "inv_freq")]
    captured = [module for module in modules if hasattr(module, _GRAPHS)]
    graphs = [(module, getattr(module, _GRAPHS)) for module in captured]
    for module in captured:
        delattr(module, _GRAPHS)
    cut = any(chunk.partition_adapter is not None for chunk in chunks)
    if cut:
        for chunk in chunks:
            put(chunk, "partition_adapter", None)
        for module in modules:
            _make_whole(module, put, te_layers)
        _forget_rotations(rotary)
    try:
        yield
    finally:
        for owner, name, value in reversed(undo):
            setattr(owner, name, value)
        for module, graph in graphs:
            setattr(module, _GRAPHS, graph)
        for layer, groups in te_layers:
            layer.set_context_parallel_group(*groups)
        if cut:
            _forget_rotations(rotary)


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
    """Clear the caches of rotary embeddings: they do not tell how what they hold was cut."""
    for kind in {type(module) for module in rotary}:
        clear = getattr(kind.forward, "cache_clear", None)
        if clear is not None:
            clear()
