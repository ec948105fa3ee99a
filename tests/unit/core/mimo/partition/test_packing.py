"""Borders of packed sequences, span numbers, row orders: what is made of them, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron.core.models.mimo.alignment import (
    RowOrder,
    build_alignment_plan,
    cut_plan,
    media_span_ids,
    place_rows,
)
from megatron.core.models.mimo.alignment.cut import packed_context_parallel_positions
from megatron.core.models.mimo.errors import InputError, UnsupportedError
from megatron.core.models.mimo.partition.packing import check_one_row, packed_params

IMAGE, SOUND = 30, 31
TOKENS = {"images": IMAGE, "sounds": SOUND}


def test_borders_of_integers_become_host_tensors_and_keys_follow_queries() -> None:
    packed = packed_params(
        {"cu_seqlens_q": (0, 3, 8), "cu_seqlens_q_padded": (0, 4, 12)}, tokens=12, cp_size=2
    )
    assert packed.cu_seqlens_q.tolist() == [0, 3, 8]
    assert packed.cu_seqlens_q.dtype == torch.int32
    assert packed.cu_seqlens_kv is packed.cu_seqlens_q
    assert packed.cu_seqlens_kv_padded is packed.cu_seqlens_q_padded
    assert (packed.max_seqlen_q, packed.max_seqlen_kv) == (8, 8)  # of places
    assert packed.qkv_format == "thd"
    assert packed_params(None) is None


def test_padding_is_told_and_stands_in_boundaries_of_its_own() -> None:
    packed = packed_params(
        {"cu_seqlens_q": (0, 3, 8, 8), "cu_seqlens_q_padded": (0, 4, 12, 16)}, tokens=16
    )
    assert packed.pad_between_seqs is True
    assert packed.bounds_q.tolist() == [0, 3, 4, 9, 12, 12, 16]
    assert packed.bounds_kv is packed.bounds_q
    assert max(packed.bounds_q.diff().tolist()) <= packed.max_seqlen_q
    tight = packed_params({"cu_seqlens_q": (0, 3, 8), "cu_seqlens_q_padded": (0, 3, 8)}, tokens=8)
    assert tight.pad_between_seqs is False
    assert tight.cu_seqlens_q_padded is tight.cu_seqlens_q
    assert tight.bounds_q.tolist() == [0, 3, 8]


def test_borders_on_a_device_are_not_read() -> None:
    on_device = torch.zeros(3, dtype=torch.int64, device="meta")
    packed = packed_params({"cu_seqlens_q": on_device, "max_seqlen_q": 5}, tokens=8, cp_size=2)
    assert packed.cu_seqlens_q.device.type == "meta"
    assert packed.cu_seqlens_q.dtype == torch.int32
    assert packed.max_seqlen_kv == 5
    assert packed.pad_between_seqs is None
    assert packed.bounds_q is None
    with pytest.raises(InputError, match="lack max_seqlen_q, and the boundaries are on a device"):
        packed_params({"cu_seqlens_q": on_device})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "lack cu_seqlens_q"),
        ({"cu_seqlens": (0, 8)}, r"packing_kwargs have \['cu_seqlens'\]"),
        ({"cu_seqlens_q": (0, 8), "qkv_format": "sbhd"}, "qkv_format 'sbhd'"),
        ({"cu_seqlens_q": (1, 8)}, r"cu_seqlens_q is \[1, 8\]; expected lengths summed up from 0"),
        ({"cu_seqlens_q": (0, 8, 4, 8)}, "expected lengths summed up from 0"),
        ({"cu_seqlens_q": (0, 4)}, "covers 4 of the row's 8 tokens"),
        (
            {"cu_seqlens_q": (0, 6, 8)},
            r"document 0 of the packed sequence takes 6 tokens, .* by 2\*cp = 4; pad it to 8",
        ),
        (
            {"cu_seqlens_q": (0, 5, 8), "cu_seqlens_q_padded": (0, 4, 8)},
            "expected a place for each document, at least as long",
        ),
    ],
)
def test_borders_that_do_not_fit_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        packed_params(arguments, tokens=8, cp_size=2)


def test_rows_and_groups_that_cannot_be_packed_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"packing_kwargs have \['local_cp_size'\]"):
        packed_params({"cu_seqlens_q": (0, 8), "local_cp_size": 2})
    assert check_one_row(a=None, b=torch.zeros(3, 1, 7)) == 7
    with pytest.raises(InputError, match=r"input_ids has shape \[2, 8\] .* one row \[1, T\]"):
        check_one_row(input_ids=torch.zeros(2, 8))


def test_every_document_is_dealt_out_by_itself() -> None:
    padded = torch.tensor([0, 4, 4, 12])  # one document has no place at all
    held = [
        packed_context_parallel_positions(padded, total_tokens=12, cp_rank=rank, cp_size=2).tolist()
        for rank in range(2)
    ]
    assert held == [[0, 3, 4, 5, 10, 11], [1, 2, 6, 7, 8, 9]]


def test_span_numbers() -> None:
    ids_BS = torch.tensor([[1, 30, 30, 30, 31, 2], [30, 5, 30, 31, 31, 30]])
    plan = build_alignment_plan(ids_BS, TOKENS)
    runs = media_span_ids(plan)
    assert runs.tolist() == [[0, 1, 1, 1, 5, 0], [2, 0, 3, 6, 6, 4]]
    assert runs.dtype == torch.int32
    # Items that touch are apart where their rows are known; one may be interrupted.
    items = media_span_ids(plan, {"images": [1, 2, 2, 1]})
    assert items.tolist() == [[0, 1, 2, 2, 0, 0], [3, 0, 3, 0, 0, 4]]
    assert media_span_ids(build_alignment_plan(torch.ones(1, 2).long(), TOKENS)).sum() == 0
    with pytest.raises(InputError, match="items of images have 5 rows together, and input_ids 6"):
        media_span_ids(plan, {"images": [5]})


def test_row_order_survives_a_cut() -> None:
    ids_BS = torch.tensor([[30, 1, 30, 30], [30, 30, 2, 3]])
    order = RowOrder(sources_N=torch.tensor([3, 0, 4, 1, 2]), encoders=("a", "b"))
    plan = build_alignment_plan(ids_BS, TOKENS, row_order={"images": order})
    assert plan.encoders == {"images": ("a", "b")}
    assert torch.equal(plan.row_order()["images"].sources_N, order.sources_N)
    rows_NH = torch.arange(5.0)[:, None]
    whole_SBH = torch.full((4, 2, 1), -1.0)
    place_rows(whole_SBH, plan.streams["images"], rows_NH)
    assert whole_SBH[..., 0].t().tolist() == [[3, -1, 0, 4], [1, 2, -1, -1]]
    cut = cut_plan(plan, torch.tensor([1, 3]))
    part_SBH = torch.full((2, 2, 1), -1.0)
    place_rows(part_SBH, cut.streams["images"], rows_NH)
    assert torch.equal(part_SBH, whole_SBH[[1, 3]])
    for sources in ([0, 1, 2, 3, 3], [0, 1]):
        bad = RowOrder(sources_N=torch.tensor(sources), encoders=("a", "b"))
        with pytest.raises(InputError, match="expected each row number once"):
            build_alignment_plan(ids_BS, TOKENS, row_order={"images": bad})
