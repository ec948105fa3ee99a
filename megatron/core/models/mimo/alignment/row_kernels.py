"""Triton kernels that place the rows of all streams, and that gather their gradients.

Imported only where Triton is there; what they compute is what ``rows`` and ``model.lookup`` do with
torch. They read tensors in place, wait for nothing and need no memory beside their results and
the parts of long sums.

Legend: L places, H features of a row, C columns and R rows of one program's block; the rest as in
``row_index``.
"""
# Triton reads the annotations of kernels, and knows constexpr alone:
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, attr-defined"

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl

from megatron.core.models.mimo.alignment.row_index import PARTIAL, ROW_BITS, RowIndex

MOST_STREAMS = 6
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_BLOCK = 1024  # elements of a program's block
_BITS = tl.constexpr(ROW_BITS)
_ROW = tl.constexpr((1 << ROW_BITS) - 1)
_PARTIAL = tl.constexpr(PARTIAL)


@triton.jit
def _taken(value_RC, rows, at_RC, takes_R, is_col_C):
    takes_RC = takes_R[:, None] & is_col_C[None, :]
    return tl.where(takes_RC, tl.load(rows + at_RC, mask=takes_RC, other=0.0), value_RC)


@triton.jit(do_not_specialize=["given_bits", "places"])
def _place(
    out,
    sources,
    ids,
    base,
    s0,
    s1,
    s2,
    s3,
    s4,
    s5,
    given_bits,
    places,
    width,
    first,
    words,
    STREAMS: tl.constexpr,
    TABLE: tl.constexpr,
    ADD: tl.constexpr,
    SOURCES: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    place_R = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    col_C = tl.program_id(1) * C + tl.arange(0, C)
    is_place_R = place_R < places
    is_col_C = col_C < width
    stream_R = tl.where(is_place_R, 0, -1)
    row_R = place_R
    if SOURCES:
        code_R = tl.load(sources + place_R, mask=is_place_R, other=-1)
        stream_R = (code_R >> _BITS).to(tl.int32)
        row_R = code_R & _ROW
        bit_R = tl.where(stream_R < 0, 31, stream_R)
        stream_R = tl.where(((given_bits >> bit_R) & 1) == 1, stream_R, -1)
    takes_R = stream_R == 0
    if TABLE:
        word_R = tl.load(ids + row_R, mask=takes_R, other=0).to(tl.int64) - first
        takes_R = takes_R & (word_R >= 0) & (word_R < words)
        row_R = tl.where(stream_R == 0, word_R, row_R)
    at_RC = row_R[:, None] * width + col_C[None, :]
    value_RC = tl.load(s0 + at_RC, mask=takes_R[:, None] & is_col_C[None, :], other=0.0)
    if STREAMS > 1:
        value_RC = _taken(value_RC, s1, at_RC, stream_R == 1, is_col_C)
    if STREAMS > 2:
        value_RC = _taken(value_RC, s2, at_RC, stream_R == 2, is_col_C)
    if STREAMS > 3:
        value_RC = _taken(value_RC, s3, at_RC, stream_R == 3, is_col_C)
    if STREAMS > 4:
        value_RC = _taken(value_RC, s4, at_RC, stream_R == 4, is_col_C)
    if STREAMS > 5:
        value_RC = _taken(value_RC, s5, at_RC, stream_R == 5, is_col_C)
    to_RC = place_R[:, None] * width + col_C[None, :]
    is_in_RC = is_place_R[:, None] & is_col_C[None, :]
    if ADD:
        before_RC = tl.load(base + to_RC, mask=is_in_RC, other=0.0)
        added_RC = value_RC.to(before_RC.dtype).to(tl.float32) + before_RC.to(tl.float32)
        value_RC = added_RC.to(before_RC.dtype)
    tl.store(out + to_RC, value_RC, mask=is_in_RC)


@triton.jit
def _entry(grad, entries, at, end, col_C, width, ENTRIES: tl.constexpr):
    row = at
    if ENTRIES:
        row = tl.load(entries + at, mask=at < end, other=0).to(tl.int64)
    row_C = tl.load(
        grad + (row * width + col_C), mask=col_C < tl.where(at < end, width, 0), other=0.0
    )
    return row_C.to(tl.float32)


@triton.jit(do_not_specialize=["first_sum", "wanted_bits"])
def _sum(
    grad,
    entries,
    starts,
    targets,
    parts,
    o0,
    o1,
    o2,
    o3,
    o4,
    o5,
    first_sum,
    wanted_bits,
    width,
    first,
    words,
    STREAMS: tl.constexpr,
    PARTS: tl.constexpr,
    ENTRIES: tl.constexpr,
    C: tl.constexpr,
):
    number = tl.program_id(0).to(tl.int64) + first_sum
    col_C = tl.program_id(1) * C + tl.arange(0, C)
    start = tl.load(starts + number)
    end = tl.load(starts + number + 1)
    code = tl.load(targets + number)
    stream = (code >> _BITS).to(tl.int32)
    row = code & _ROW
    row = tl.where(stream == 0, row - first, row)
    is_here = (stream != 0) | ((row >= 0) & (row < words))
    is_wanted = is_here & (((wanted_bits >> stream) & 1) == 1)
    end = tl.where(is_wanted, end, start)
    sum_C = tl.full([C], 0.0, tl.float32)
    # four rows at a time, so that their loads overlap; added one by one, in order
    for step in range(0, end - start, 4):
        at = start.to(tl.int64) + step
        row0_C = _entry(grad, entries, at, end, col_C, width, ENTRIES)
        row1_C = _entry(grad, entries, at + 1, end, col_C, width, ENTRIES)
        row2_C = _entry(grad, entries, at + 2, end, col_C, width, ENTRIES)
        row3_C = _entry(grad, entries, at + 3, end, col_C, width, ENTRIES)
        sum_C = (((sum_C + row0_C) + row1_C) + row2_C) + row3_C
    to_C = row * width + col_C
    stream = tl.where(is_wanted, stream, -1)
    result_C = sum_C.to(o0.dtype.element_ty)
    tl.store(o0 + to_C, result_C, mask=col_C < tl.where(stream == 0, width, 0))
    if STREAMS > 1:
        tl.store(o1 + to_C, result_C, mask=col_C < tl.where(stream == 1, width, 0))
    if STREAMS > 2:
        tl.store(o2 + to_C, result_C, mask=col_C < tl.where(stream == 2, width, 0))
    if STREAMS > 3:
        tl.store(o3 + to_C, result_C, mask=col_C < tl.where(stream == 3, width, 0))
    if STREAMS > 4:
        tl.store(o4 + to_C, result_C, mask=col_C < tl.where(stream == 4, width, 0))
    if STREAMS > 5:
        tl.store(o5 + to_C, result_C, mask=col_C < tl.where(stream == 5, width, 0))
    if PARTS:
        tl.store(parts + to_C, sum_C, mask=col_C < tl.where(stream == _PARTIAL, width, 0))


INTERPRETED = not isinstance(_place, triton.runtime.JITFunction)
"""The kernels run in Triton's interpreter, on the CPU."""


def place(
    out_LH: torch.Tensor,
    streams: Sequence[torch.Tensor | None],
    sources_L: torch.Tensor,
    *,
    ids_N: torch.Tensor | None = None,
    first: int = 0,
    base_LH: torch.Tensor | None = None,
) -> None:
    """Write every row of ``out_LH``, in one launch; zeros where no row goes.

    Args:
        out_LH: contiguous.
        streams: rows [N, H] by the number of their stream, in the dtype of ``out_LH`` unless they
            are added; None for streams whose rows are left out.
        sources_L: as in ``RowIndex``.
        ids_N: given, stream 0 is a table, and row n of text is its row ``ids_N[n] - first``: zeros
            where the table has no such row.
        first: id of the table's first row.
        base_LH: what the rows are added to; contiguous, in the dtype of ``out_LH``.
    """
    width = out_LH.size(-1)
    _launch_place(
        out_LH, streams, sources_L, ids_N=ids_N, first=first, base_LH=base_LH, width=width
    )


def look_up(table_VH: torch.Tensor, ids_N: torch.Tensor, first: int = 0) -> torch.Tensor:
    """Rows [N, H] of a table, zeros where it has no row ``ids_N - first``; one launch."""
    rows_NH = table_VH.new_empty(ids_N.numel(), table_VH.size(1))
    _launch_place(
        rows_NH,
        [table_VH],
        None,
        ids_N=ids_N,
        first=first,
        base_LH=None,
        width=table_VH.size(1),
    )
    return rows_NH


def gather_sums(
    grad_LH: torch.Tensor,
    index: RowIndex,
    outs: Sequence[torch.Tensor | None],
    *,
    first: int = 0,
) -> None:
    """Write the gradients of all streams, each row once; launches once, twice with long sums.

    Args:
        grad_LH: gradient of the merged rows.
        index: by which they were placed.
        outs: what is written by the number of the stream, [N, H] of a modality; the text's is a
            table, whose rows of other words are left as they are. None where none is wanted.
        first: id of the table's first row.
    """
    with_text = outs[0] is not None
    first_sum = 0 if with_text else index.text_sums
    _launch_sums(
        grad_LH,
        index,
        outs,
        sums=range(first_sum, index.targets_U.numel()),
        first=first,
    )


def _device_of(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the device that is the current one."""
    if tensor.device.type == "cpu":
        return nullcontext()
    context: AbstractContextManager[Any] = torch.get_device_module(tensor.device).device(
        tensor.device
    )
    return context


def _blocks(width: int) -> tuple[int, int]:
    """Rows and columns of a program's block."""
    columns = min(triton.next_power_of_2(width), _BLOCK)
    return _BLOCK // columns, columns


def _launch_place(
    out_LH: torch.Tensor,
    streams: Sequence[torch.Tensor | None],
    sources_L: torch.Tensor | None,
    *,
    ids_N: torch.Tensor | None,
    first: int,
    base_LH: torch.Tensor | None,
    width: int,
) -> None:
    places = out_LH.numel() // max(width, 1)
    if not places:
        return
    rows, columns = _blocks(width)
    given = [out_LH if one is None else one.contiguous() for one in streams]
    padded = [*given, *[out_LH] * (MOST_STREAMS - len(given))]
    with _device_of(out_LH):
        _place[triton.cdiv(places, rows), triton.cdiv(width, columns)](
            out_LH,
            out_LH if sources_L is None else sources_L,
            out_LH if ids_N is None else ids_N,
            out_LH if base_LH is None else base_LH,
            *padded,
            sum(1 << number for number, one in enumerate(streams) if one is not None),
            places,
            width,
            first,
            given[0].size(0),
            STREAMS=len(given),
            TABLE=ids_N is not None,
            ADD=base_LH is not None,
            SOURCES=sources_L is not None,
            R=rows,
            C=columns,
        )


def _launch_sums(
    grad_LH: torch.Tensor,
    index: RowIndex,
    outs: Sequence[torch.Tensor | None],
    *,
    sums: range,
    first: int,
) -> None:
    if not len(sums):
        return
    table_VH, width = outs[0], grad_LH.size(-1)
    _, columns = _blocks(width)
    across = triton.cdiv(width, columns)
    wanted = sum(1 << number for number, one in enumerate(outs) if one is not None)
    has_parts = table_VH is not None and index.parts > 0
    parts_PH = grad_LH
    if has_parts:
        wanted |= 1 << PARTIAL
        parts_PH = grad_LH.new_empty(index.parts, width, dtype=torch.float32)
    some = next(one for one in outs if one is not None)
    padded = [some if one is None else one for one in outs]
    padded += [some] * (MOST_STREAMS - len(padded))
    words = 0 if table_VH is None else table_VH.size(0)
    shared: dict[str, Any] = {"width": width, "first": first, "words": words, "C": columns}
    with _device_of(grad_LH):
        _sum[len(sums), across](
            grad_LH,
            index.entries_E,
            index.starts_U,
            index.targets_U,
            parts_PH,
            *padded,
            first_sum=sums.start,
            wanted_bits=wanted,
            STREAMS=len(outs),
            PARTS=has_parts,
            ENTRIES=True,
            **shared,
        )
        if has_parts:
            _sum[index.part_targets_W.numel(), across](
                parts_PH,
                index.entries_E,
                index.part_starts_W,
                index.part_targets_W,
                parts_PH,
                *[table_VH] * MOST_STREAMS,
                first_sum=0,
                wanted_bits=1,
                STREAMS=1,
                PARTS=False,
                ENTRIES=False,
                **shared,
            )
