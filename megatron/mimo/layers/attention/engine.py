"""Transformer Engine's attention of a packed row, asked once for all layers which kernel serves.

Its module decides at every call which of its parts computes: 0.3 ms of the host for each layer on
an H200's machine, beside 0.2 ms of kernels. All layers of a micro-batch get the same answer. Here
the first one calls the module, what this calls of its parts is kept in the row, and the other
layers call their own part in the same way.

Legend: T packed tokens, H query heads, G key heads, D head size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from megatron.core.models.mimo.partition.packing import PackedRow

__all__ = ["EngineAttention", "is_engine"]

# What a part may be told that only its own layer knows, or that is no plain attention.
_UNSHARED = ("fp8", "inference_params", "core_attention_bias", "softmax_offset", "score_mod")
_OWN = ("fp8_meta", "quantizers")
# Settings of a module that its choice of a part depends on.
_SETTINGS = ("window_size", "attention_dropout", "softcap", "softmax_type", "deterministic")


def is_engine(core: nn.Module) -> bool:
    """Whether a core attention is megatron-core's on Transformer Engine; it may be absent."""
    return type(core).__name__ == "TEDotProductAttention"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Call:
    """How a module called one of its parts.

    Attributes:
        part: its name.
        named: arguments behind queries, keys and values.
        own: names of those that are attributes of the layer's module.
    """

    part: str
    named: Mapping[str, Any]
    own: tuple[str, ...]


class EngineAttention:
    """A layer's attention on Transformer Engine; what it computes is its module's.

    Args:
        core: the module, a ``TEDotProductAttention``.
    """

    def __init__(self, core: Any) -> None:
        self._core = core
        self._settings = tuple(getattr(core, name, None) for name in _SETTINGS)
        self._alone = core.config.context_parallel_size == 1

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        attn_mask_type: Any,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """As the module: [S, B, H * D], or [T, H * D] of a packed row."""
        core, row, asked = self._core, packed_seq_params, None
        if query.is_contiguous():  # beside a view it looks twice at strides, and copies all three
            value = value.contiguous()
        if attention_mask is None and self._alone and _is_shared(row, query, key):
            sizes = (query.shape, key.shape, value.shape, query.dtype)
            asked = (attn_mask_type, core.training, self._settings, sizes)
            call = row.kernel_calls.get(asked)
            if call is not None:
                own = {name: getattr(core, name) for name in call.own}
                out: Tensor = core._modules[call.part](query, key, value, **call.named, **own)
                return out
        ask = partial(core, attn_mask_type=attn_mask_type, packed_seq_params=row)
        if asked is None:
            whole: Tensor = ask(query, key, value, attention_mask)
            return whole
        whole, call = _observed(core, ask, query, key, value)
        if call is not None:
            row.kernel_calls[asked] = call
        return whole


def _is_shared(row: Any, query: Tensor, key: Tensor) -> bool:
    """Whether a row can keep a call, and tensors are as the module hands them to its parts."""
    return (
        isinstance(row, PackedRow)
        and row.cp_group is None
        and row.local_cp_size is None
        and query.is_contiguous()
        and key.is_contiguous()
    )


def _observed(
    core: nn.Module, ask: Any, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, _Call | None]:
    """The module's result, and the call of a part that gave it; None where other work is in it."""
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any], Any]] = []

    def note(name: str, _: Any, given: tuple[Any, ...], named: dict[str, Any], out: Any) -> None:
        calls.append((name, given, named, out))

    handles = [
        part.register_forward_hook(partial(note, name), with_kwargs=True)
        for name, part in core.named_children()
    ]
    try:
        whole: Tensor = ask(query, key, value, None)
    finally:
        for handle in handles:
            handle.remove()
    if len(calls) != 1:
        return whole, None
    ((part, given, named, out),) = calls
    as_given = len(given) == 3 and all(
        one is other for one, other in zip(given, (query, key, value), strict=True)
    )
    if out is not whole or not as_given or any(_is_set(named.get(name)) for name in _UNSHARED):
        return whole, None
    own = tuple(name for name in _OWN if name in named)
    shared = {name: one for name, one in named.items() if name not in own}
    return whole, _Call(part=part, named=shared, own=own)


def _is_set(value: Any) -> bool:
    return value is not None and value is not False
