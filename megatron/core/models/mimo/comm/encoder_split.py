"""Encoder work divided among ranks that hold the same inputs.

In the uniform layout the tensor- and context-parallel ranks of one data-parallel index have the
same images. Instead of each encoding all of them, each encodes some, and the ranks exchange the
rows once. Items (images, clips) stay in order: a rank takes a contiguous part of them, chosen so
that the largest number of rows on any rank is as small as it can be. Items are never divided.

Why gradients stay right. Let g be the gradient of a row, as one process has it.

- *Context parallelism* ("shares"): each rank placed some of the rows, so the ranks' gradients of
  a row add up to g. The adjoint sums them and gives each rank g of its own rows. The encoder's
  parameters then hold the part that comes from the rank's items, and the data-parallel reduction,
  which sums over dp x cp, adds the parts up.
- *Tensor parallelism* ("copies"): each rank has g of every row (see ``merge_streams``). The adjoint
  takes the rank's own rows and multiplies by the size of the group; no rank communicates. Nobody
  sums over tensor-parallel ranks, so the parameters carry Megatron's own mark
  ``average_gradients_across_tp_domain``: ``finalize_model_grads`` takes the mean of their
  gradients, and the mean of size * part is the sum of the parts. A micro-batch that is not split
  (one image) leaves the whole gradient on every rank, whose mean is itself.

A rank without items encodes the smallest one and drops its rows: its parameters get a gradient of
zero, and hooks and reductions come in the order in which the others have them.

Legend: N rows of one encoder, H features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Literal

import torch
import torch.distributed as dist

from megatron.core.models.mimo.alignment import Encoded, EncodedRows
from megatron.core.models.mimo.errors import InputError
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.utils import get_pg_rank, get_pg_size, unwrap_model

Inputs = Mapping[str, Any]
Encode = Callable[[Inputs], Encoded]
Gradients = Literal["shares", "copies"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Sharers:
    """Ranks that hold the same encoder inputs, and what each knows of a row's gradient.

    Attributes:
        group: the ranks.
        gradients: "shares", which add up over the group, or "copies" of the whole.
    """

    group: dist.ProcessGroup
    gradients: Gradients


@dataclass(frozen=True, kw_only=True, eq=False)
class EncoderSplit:
    """Runs one encoder on this rank's items and returns the rows of all.

    Attributes:
        sharers: groups over which items are divided, one inside the other; the outer one first.
    """

    sharers: tuple[Sharers, ...]

    def __call__(
        self, name: str, encoder: torch.nn.Module, encode: Encode, inputs: Inputs
    ) -> Encoded:
        """Rows [N, H] of all items, on every rank and as ``encode(inputs)`` would order them.

        All ranks of ``sharers`` take part, with equal inputs: per group one exchange of [N, H] in
        forward, and for "shares" one reduction of [N, H] in backward where the encoder is trained.
        Levels of the rows travel beside them, in the same exchange. A group in which no rank would
        save work exchanges nothing.

        Args:
            name: the encoder's, for errors.
            encoder: has ``rows_per_item(**inputs)``.
            encode: runs it: rows [n, H] of the items it is given, with their levels.
            inputs: keyword arguments of the encoder's call.

        Raises:
            InputError: inputs that are not items along dimension 0; another number of rows than
                the encoder announced.
        """
        counts = rows_of_items(name, encoder, inputs)
        first, last = 0, len(counts)
        exchanges: list[tuple[Sharers, list[int]]] = []
        for sharers in self.sharers:
            parts = divide_items(counts[first:last], get_pg_size(sharers.group))
            if parts is None:
                continue
            bounds = [first, *(first + end for end in accumulate(parts))]
            exchanges.append((sharers, [sum(counts[a:b]) for a, b in pairwise(bounds)]))
            rank = get_pg_rank(sharers.group)
            first, last = bounds[rank], bounds[rank + 1]
        if not exchanges:
            return encode(inputs)
        apart = any(sharers.gradients == "copies" for sharers, _ in exchanges)
        with _own_generator() if apart and encoder.training else nullcontext():
            encoded = _encode_part(name, encode, inputs, counts, first, last)
        for sharers, rows in reversed(exchanges):
            encoded = gather_encoded(encoded, rows, sharers)
        return encoded.simplest()


def rows_of_items(name: str, encoder: torch.nn.Module, inputs: Inputs) -> list[int]:
    """Rows that each item will give, as host integers."""
    declared: Any = unwrap_model(encoder)
    counts = list(declared.rows_per_item(**inputs))
    if any(type(count) is not int or count < 0 for count in counts):
        raise InputError(
            f"rows_per_item of encoder '{name}' gave {counts}; expected one host integer of at "
            "least 0 per item (no tensors, which would wait for the device)"
        )
    return counts


def divide_items(rows: Sequence[int], size: int) -> list[int] | None:
    """How many items each of ``size`` ranks takes, in order; None where dividing saves nothing.

    The largest number of rows on a rank is the smallest that contiguous parts allow.

    Args:
        rows: rows of each item.
        size: ranks.
    """
    low, high = max(rows, default=0), sum(rows)
    if low == high or size == 1:  # one item has all the rows
        return None
    while low < high:
        middle = (low + high) // 2
        if len(_fill(rows, middle)) <= size:
            high = middle
        else:
            low = middle + 1
    parts = _fill(rows, low)
    return parts + [0] * (size - len(parts))


def cut_inputs(name: str, inputs: Inputs, num_items: int, first: int, last: int) -> dict[str, Any]:
    """The arguments of an encoder for items ``first`` to ``last``, ``last`` left out.

    Tensors and sequences hold items along dimension 0. What has none (numbers, flags, tensors
    without dimensions) is passed on.

    Raises:
        InputError: a tensor or sequence of another length than ``num_items``.
    """
    held = {}
    for key, value in inputs.items():
        if isinstance(value, list | tuple) or (torch.is_tensor(value) and value.dim()):
            if len(value) != num_items:
                raise InputError(
                    f"argument {key!r} of encoder '{name}' has {len(value)} entries along "
                    f"dimension 0, and rows_per_item announced {num_items} items; an encoder can "
                    "be split where all its inputs have one entry per item. Give such inputs, or "
                    "set encoder_split to 'never' in MimoModelConfig"
                )
            held[key] = value[first:last]
        else:
            held[key] = value
    return held


def gather_encoded(encoded: EncodedRows, counts: Sequence[int], sharers: Sharers) -> EncodedRows:
    """``gather_rows`` of rows and levels together, side by side in one exchange."""
    if not encoded.levels:
        return EncodedRows(rows_NH=gather_rows(encoded.rows_NH, counts, sharers))
    widths = [tensor.size(1) for tensor in encoded.tensors]
    gathered = gather_rows(torch.cat(encoded.tensors, dim=1), counts, sharers)
    rows_NH, *levels = torch.split(gathered, widths, dim=1)
    return EncodedRows(rows_NH=rows_NH, levels=tuple(levels))


def gather_rows(rows_NH: torch.Tensor, counts: Sequence[int], sharers: Sharers) -> torch.Tensor:
    """The rows [sum(counts), H] of all ranks of a group, from ``counts[rank]`` rows of each.

    All ranks of the group take part in one all-gather; in uneven numbers, in one broadcast per
    rank that has rows. Adjoint, for this rank's rows: with "shares", the sum of the ranks'
    gradients, by one reduce-scatter (uneven: one reduction per rank that has rows); with
    "copies", this rank's gradient times the size of the group, without communication.
    """
    gathered_NH: torch.Tensor = _GatherRows.apply(rows_NH, tuple(counts), sharers)
    return gathered_NH


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows_NH: torch.Tensor, counts: tuple[int, ...], sharers: Sharers
    ) -> torch.Tensor:
        ctx.counts, ctx.sharers = counts, sharers
        gathered_NH = rows_NH.new_empty(sum(counts), rows_NH.size(1))
        group, rank = sharers.group, get_pg_rank(sharers.group)
        if len(set(counts)) == 1:
            dist.all_gather_into_tensor(gathered_NH, rows_NH.contiguous(), group=group)
            return gathered_NH
        parts = gathered_NH.split_with_sizes(counts)
        parts[rank].copy_(rows_NH)
        works = [
            dist.broadcast(part_NH, group_src=source, group=group, async_op=True)
            for source, part_NH in enumerate(parts)
            if counts[source]
        ]
        _wait_for(works)
        return gathered_NH

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        counts, group, grad_NH = ctx.counts, ctx.sharers.group, grad_outputs[0]
        rank = get_pg_rank(group)
        if ctx.sharers.gradients == "copies":
            return grad_NH.split_with_sizes(counts)[rank] * len(counts), None, None
        if len(set(counts)) == 1:
            own_NH = grad_NH.new_empty(counts[rank], grad_NH.size(1))
            dist.reduce_scatter_tensor(own_NH, grad_NH.contiguous(), group=group)
            return own_NH, None, None
        # a reduction leaves no meaning in the buffers of ranks that it does not go to
        parts = grad_NH.clone(memory_format=torch.contiguous_format).split_with_sizes(counts)
        works = [
            dist.reduce(part_NH, group_dst=owner, group=group, async_op=True)
            for owner, part_NH in enumerate(parts)
            if counts[owner]
        ]
        _wait_for(works)
        return parts[rank], None, None


def _wait_for(works: Sequence[dist.Work | None]) -> None:
    for work in works:
        if work is not None:
            work.wait()


def _encode_part(
    name: str, encode: Encode, inputs: Inputs, counts: Sequence[int], first: int, last: int
) -> EncodedRows:
    """Rows [n, H] of items ``first`` to ``last``; [0, H] where there are none."""
    is_idle = first == last
    if is_idle:
        first = min(range(len(counts)), key=counts.__getitem__)
        last = first + 1
    encoded = EncodedRows.of(encode(cut_inputs(name, inputs, len(counts), first, last)))
    expected = sum(counts[first:last])
    if encoded.num_rows != expected:
        raise InputError(
            f"encoder '{name}' gave {encoded.num_rows} rows for items {first} to {last - 1}, and "
            f"its rows_per_item announced {expected}; both have to agree for it to be split"
        )
    return encoded.map(lambda tensor: tensor[:0]) if is_idle else encoded


def _fill(rows: Sequence[int], capacity: int) -> list[int]:
    """Items per rank when each rank takes items while they fit; no item exceeds the capacity."""
    parts, held = [0], 0
    for count in rows:
        if held + count > capacity:
            parts.append(0)
            held = 0
        parts[-1] += 1
        held += count
    return parts


def _own_generator() -> Any:
    """The model-parallel generator, which differs over tensor-parallel ranks.

    Their default generators have to stay equal: later dropout of replicated activations draws
    from them, and ranks with different items would leave them in different states.
    """
    return get_cuda_rng_tracker().fork()
