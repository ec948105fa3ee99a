"""Placeholder positions -> plan -> merged embeddings, against a loop over tokens.

Legend: S sequence, B micro-batch, H hidden, N rows of one stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch

from megatron.core.models.mimo.alignment import (
    AlignmentPlan,
    build_alignment_plan,
    cut_plan,
    place_rows,
    plan_from_indices,
    take_rows,
)
from megatron.core.models.mimo.alignment.cut import (
    context_parallel_positions,
    sequence_parallel_positions,
)
from megatron.core.models.mimo.errors import InputError

HIDDEN = 3
IDS = {"images": 90, "audio": -200}
RUNS_BS = torch.full((2, 40), 1).index_fill(1, torch.arange(4, 36), 90)  # long runs
SCATTERED_BS = torch.tensor([[90, 1, -200, 90, 2, 3, 90, -200], [4, -200, 90, 90, 5, 90, 6, 7]])
CASES = {
    "scattered": SCATTERED_BS,
    "runs": RUNS_BS,
    "no media": torch.arange(10).view(2, 5),
    "a row of images only": torch.tensor([[90, 90, 90], [1, 2, 3]]),
    "images only": torch.full((2, 3), 90),
    "one sample": torch.tensor([[1, 90, 90, 2]]),
    "first and last": torch.tensor([[90, 1, 90], [-200, 2, -200]]),
    "nine images and none": torch.tensor([[90] * 9 + [1] * 3, list(range(12))]),
    "not contiguous": SCATTERED_BS.repeat(2, 1).t()[:4].t(),
    "int32": SCATTERED_BS.int(),
}


def draw_rows(input_ids_BS: torch.Tensor) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    counts = {name: int((input_ids_BS == token).sum()) for name, token in IDS.items()}
    counts["text"] = input_ids_BS.numel() - sum(counts.values())
    return {
        name: torch.randn(count, HIDDEN, generator=generator, dtype=torch.float64)
        for name, count in counts.items()
    }


def merge_by_loop(
    input_ids_BS: torch.Tensor, rows: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, list[int]]:
    """The rule, token by token: merged [S, B, H] and the ids of the text rows."""
    batch, length = input_ids_BS.shape
    merged_SBH = torch.full((length, batch, HIDDEN), torch.nan, dtype=torch.float64)
    left = {name: list(rows_NH) for name, rows_NH in rows.items()}
    names = {token: name for name, token in IDS.items()}
    text_ids = []
    for b in range(batch):
        for s in range(length):
            token = int(input_ids_BS[b, s])
            if token not in names:
                text_ids.append(token)
            merged_SBH[s, b] = left[names.get(token, "text")].pop(0)
    assert not any(left.values())
    return merged_SBH, text_ids


def place(plan: AlignmentPlan, rows: Mapping[str, torch.Tensor]) -> torch.Tensor:
    merged_SBH = torch.full(
        (plan.sequence_length, plan.batch_size, HIDDEN), torch.nan, dtype=torch.float64
    )
    for name, rows_NH in rows.items():
        place_rows(merged_SBH, plan.streams[name], rows_NH)
    return merged_SBH


def without_runs(plan: AlignmentPlan) -> AlignmentPlan:
    streams = {name: replace(stream, runs=None) for name, stream in plan.streams.items()}
    return replace(plan, streams=streams)


@pytest.mark.parametrize("input_ids_BS", CASES.values(), ids=CASES)
def test_plan_places_every_row_where_the_rule_says(input_ids_BS: torch.Tensor) -> None:
    rows = draw_rows(input_ids_BS)
    expected_SBH, text_ids = merge_by_loop(input_ids_BS, rows)
    plan = build_alignment_plan(input_ids_BS, IDS)
    assert plan.text_ids_N.tolist() == text_ids
    assert plan.counts == {name: rows[name].size(0) for name in IDS}
    assert torch.equal(place(plan, rows), expected_SBH)
    assert torch.equal(place(without_runs(plan), rows), expected_SBH)


def test_blocks_are_copied_where_they_pay() -> None:
    plan = build_alignment_plan(RUNS_BS, IDS)
    runs = plan.streams["images"].runs
    assert runs is not None
    assert [(run.sample, run.position, run.source, run.length) for run in runs] == [
        (0, 4, 0, 32),
        (1, 4, 32, 32),
    ]
    assert build_alignment_plan(SCATTERED_BS, IDS).streams["images"].runs is None


@pytest.mark.parametrize("input_ids_BS", CASES.values(), ids=CASES)
def test_plan_from_indices_is_the_same_plan(input_ids_BS: torch.Tensor) -> None:
    flat = input_ids_BS.reshape(-1).tolist()
    names = {token: name for name, token in IDS.items()}
    indices: dict[str, list[int]] = {"text": [], **{name: [] for name in IDS}}
    for position, token in enumerate(flat):
        indices[names.get(token, "text")].append(position)
    plan = plan_from_indices(
        input_ids_BS, {name: torch.tensor(where).long() for name, where in indices.items()}
    )
    rows = draw_rows(input_ids_BS)
    assert torch.equal(place(plan, rows), merge_by_loop(input_ids_BS, rows)[0])
    assert plan.counts == build_alignment_plan(input_ids_BS, IDS).counts


CUTS = {
    "context parallel": (2, 1),
    "sequence parallel": (1, 2),
    "both": (2, 2),
    "wide": (1, 4),
}


@pytest.mark.parametrize(("cp", "tp"), CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("name", ["scattered", "runs", "no media", "images only"])
def test_cut_plan_places_this_ranks_part(name: str, cp: int, tp: int) -> None:
    input_ids_BS = CASES[name].repeat(1, 8)[:, : 8 * (CASES[name].size(1) // 8 + 1)]
    rows = draw_rows(input_ids_BS)
    whole_SBH, _ = merge_by_loop(input_ids_BS, rows)
    plan = build_alignment_plan(input_ids_BS, IDS)
    length = input_ids_BS.size(1)
    for cp_rank in range(cp):
        held = list(range(length))
        local = plan
        if cp > 1:
            chunk = length // (2 * cp)
            held = [
                *range(cp_rank * chunk, (cp_rank + 1) * chunk),
                *range(length - (cp_rank + 1) * chunk, length - cp_rank * chunk),
            ]
            local = cut_plan(plan, context_parallel_positions(length, cp_rank=cp_rank, cp_size=cp))
        for tp_rank in range(tp):
            piece, mine = local, held
            if tp > 1:
                size = len(held) // tp
                mine = held[tp_rank * size : (tp_rank + 1) * size]
                positions_S = sequence_parallel_positions(len(held), tp_rank=tp_rank, tp_size=tp)
                piece = cut_plan(local, positions_S)
            local_rows = {**rows, "text": text_rows_held(input_ids_BS, rows["text"], mine)}
            got_SBH = place(piece, local_rows)
            assert torch.equal(got_SBH, whole_SBH[mine])
            assert torch.equal(got_SBH, place(without_runs(piece), local_rows))
            assert piece.counts == plan.counts
            assert piece.positions_S is not None
            assert piece.positions_S.tolist() == mine
            assert len(piece.text_ids_N) == len(local_rows["text"])


def text_rows_held(
    input_ids_BS: torch.Tensor, text_NH: torch.Tensor, held: list[int]
) -> torch.Tensor:
    kept, number = [], 0
    for ids in input_ids_BS.tolist():
        for position, token in enumerate(ids):
            if token not in IDS.values():
                if position in set(held):
                    kept.append(number)
                number += 1
    return text_NH[kept]


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("name", ["scattered", "runs", "no media"])
def test_taking_is_the_adjoint_of_placing(name: str, cut: bool) -> None:
    plan = build_alignment_plan(CASES[name], IDS)
    if cut:
        positions_S = torch.arange(plan.sequence_length)[1::2]
        plan = cut_plan(plan, positions_S)
    generator = torch.Generator().manual_seed(2)
    shape = (plan.sequence_length, plan.batch_size, HIDDEN)
    grad_SBH = torch.randn(shape, generator=generator, dtype=torch.float64)
    rows = draw_rows(CASES[name])
    rows["text"] = rows["text"][: len(plan.text_ids_N)]
    for stream_name, rows_NH in rows.items():
        stream = plan.streams[stream_name]
        placed_SBH = torch.zeros(shape, dtype=torch.float64)
        place_rows(placed_SBH, stream, rows_NH)
        taken_NH = take_rows(grad_SBH, stream, rows_NH.size(0))
        assert taken_NH.shape == rows_NH.shape
        torch.testing.assert_close((placed_SBH * grad_SBH).sum(), (rows_NH * taken_NH).sum())


def test_moving_a_plan_keeps_it_whole() -> None:
    piece = cut_plan(build_alignment_plan(SCATTERED_BS, IDS), torch.arange(4))
    plan = replace(piece, pieces=(piece,))
    moved = plan.to("meta")
    assert len(moved.pieces) == 1
    for part in (moved, *moved.pieces):
        assert part.text_ids_N.is_meta
        assert part.positions_S is not None
        assert part.positions_S.is_meta
        assert all(stream.rows_N.is_meta for stream in part.streams.values())
        sources = [part.streams[name].sources_N for name in IDS]
        assert all(sources_N is not None and sources_N.is_meta for sources_N in sources)
        assert part.counts == plan.counts
    assert plan.to("cpu").streams["text"].rows_N.equal(plan.streams["text"].rows_N)


@pytest.mark.parametrize(
    ("input_ids", "vocab_size", "message"),
    [
        (torch.tensor([1, 90, 2]), None, r"shape \(3,\); expected \[batch, sequence\]"),
        (torch.zeros(1, 2, 3, dtype=torch.long), None, r"shape \(1, 2, 3\)"),
        (torch.zeros(1, 2), None, r"torch\.float32; expected torch\.int64"),
        (torch.tensor([[1, 2], [3, -5]]), None, r"input_ids\[1, 1\] is -5; .* non-negative"),
        (torch.tensor([[90, 2], [64, 3]]), 64, r"input_ids\[1, 0\] is 64; .* in 0\.\.63"),
    ],
)
def test_wrong_ids_are_refused(
    input_ids: torch.Tensor, vocab_size: int | None, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        build_alignment_plan(input_ids, IDS, vocab_size=vocab_size)


@pytest.mark.parametrize(
    "indices",
    [
        {"images": [0, 1, 2, 3]},  # no text
        {"text": [0, 1], "images": [2]},  # one left out
        {"text": [0, 1, 2], "images": [2, 3]},  # one too many
        {"text": [0, 1], "images": [1, 3]},  # one twice, one left out
        {"text": [0, 1], "images": [2, 4]},  # outside
        {"text": [0, 1], "images": [2, -1]},
    ],
)
def test_wrong_indices_are_refused(indices: dict[str, list[int]]) -> None:
    with pytest.raises(InputError, match="each once"):
        plan_from_indices(
            torch.zeros(2, 2, dtype=torch.long),
            {name: torch.tensor(where) for name, where in indices.items()},
        )
