"""Prompts as batches that end together, and answers that end."""

from __future__ import annotations

import pytest
import torch

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.data import MediaFormat, MediaItem, Sample, SampleCollator
from megatron.mimo.inference import SamplingOptions
from megatron.mimo.inference.answers import Answers
from megatron.mimo.inference.prompts import (
    PromptBatch,
    check_prompts,
    collate_prompts,
    group_prompts,
    text_plan,
)

IMAGE, PAD = 9, 0


def prompt(*ids: int, positions: torch.Tensor | None = None) -> Sample:
    pixels = {"pixels": torch.zeros(3)}
    return Sample(
        name="p",
        token_ids=torch.tensor(ids, dtype=torch.int64),
        is_label=torch.zeros(len(ids), dtype=torch.bool),
        media=tuple(
            MediaItem(modality="images", encoder="e", inputs=pixels, rows=1)
            for one in ids
            if one == IMAGE
        ),
        position_ids=positions,
    )


def collator(*, mrope: bool = False) -> SampleCollator:
    return SampleCollator(
        seq_length=8,
        vocab_size=10,
        pad_id=PAD,
        special_token_ids={"images": IMAGE},
        media_formats={
            "images": MediaFormat(encoder="e", inputs={"pixels": (torch.float32, (3,))})
        },
        span_modalities=("images",),
        mrope=mrope,
    )


def collated(
    *prompts: Sample, three_axes: bool = False, max_length: int | None = None
) -> PromptBatch:
    return collate_prompts(
        prompts,
        collator(mrope=three_axes),
        special_token_ids={"images": IMAGE},
        answer_length=2,
        max_length=max_length,
        three_axes=three_axes,
    )


def test_prompts_end_at_the_same_place() -> None:
    batch = collated(prompt(1, IMAGE, 3, 4), prompt(5, IMAGE))
    assert batch.input_ids.tolist() == [[1, IMAGE, 3, 4], [PAD, PAD, 5, IMAGE]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 2, 3]]
    assert batch.padding_BL.tolist() == [[False] * 6, [True, True] + [False] * 4]
    assert batch.span_ids.tolist() == [[0, 1, 0, 0], [0, 0, 0, 2]]
    assert batch.plan.counts == {"images": 2}
    assert batch.plan.streams["images"].rows_N.tolist() == [1 * 2 + 0, 3 * 2 + 1]
    assert len(batch.modality_inputs["images"]["e"]["pixels"]) == 2


def test_no_padding_is_no_mask() -> None:
    assert collated(prompt(1, 2), prompt(3, 4)).padding_BL is None


def test_positions_stay_inside_a_table() -> None:
    batch = collated(prompt(1, 2, 3), max_length=4)
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 3]]


def test_answers_count_on_from_the_last_token() -> None:
    positions = torch.tensor([[0, 9, 1], [0, 1, 4], [0, 1, 2]])
    batch = collated(prompt(1, 2, 3, positions=positions), prompt(4), three_axes=True, max_length=5)
    assert batch.position_ids[:, 0].tolist() == [[0, 9, 1, 5, 6], [0, 1, 4, 5, 6], [0, 1, 2, 5, 6]]
    assert batch.position_ids[:, 1].tolist() == [[0, 0, 0, 1, 2]] * 3


def test_grouping() -> None:
    assert group_prompts([3, 5, 5, 1, 3], 2, padded=True) == [[1, 2], [0, 4], [3]]
    assert group_prompts([3, 5, 5, 1, 3], 2, padded=False) == [[1, 2], [0, 4], [3]]
    assert group_prompts([3, 5, 1], 3, padded=True) == [[1, 0, 2]]
    assert group_prompts([3, 5, 1], 3, padded=False) == [[1], [0], [2]]
    assert group_prompts([], 3, padded=True) == []


def test_a_step_of_text_places_one_token_for_each_sequence() -> None:
    plan = text_plan(torch.tensor([4, 7]))
    assert (plan.batch_size, plan.sequence_length) == (2, 1)
    assert plan.streams["text"].rows_N.tolist() == [0, 1]
    assert plan.text_ids_N.tolist() == [4, 7]


@pytest.mark.parametrize(
    ("ids", "message"),
    [((), "an empty prompt"), ((1, 2, 3, 4), "prompt of 4 tokens leaves no room .* 4 positions")],
)
def test_refused_prompts(ids: tuple[int, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_prompts([prompt(1), prompt(*ids)], 4)


def test_answers_end() -> None:
    told: list[tuple[int, int]] = []

    def on_token(number: int, token: int) -> bool:
        told.append((number, token))
        return token == 8

    options = SamplingOptions(max_new_tokens=3, stop_tokens=(5, 6))
    answers = Answers([1, 1, 1, 7], options, 8, on_token)
    for token in (1, 2, 3, 4):
        answers.take(0, token)  # the longest answer
    for token in (1, 6, 1):
        answers.take(1, token)  # a stop token
    for token in (1, 8, 1):
        answers.take(2, token)  # asked to
    for token in (1, 2, 3):
        answers.take(3, token)  # the model reads 8 tokens: 7 of the prompt and one
    assert answers.tokens == [[1, 2, 3], [1], [1, 8], [1, 2]]
    assert not any(answers.is_open(number) for number in range(4))
    assert told == [(0, 1), (0, 2), (0, 3), (1, 1), (2, 1), (2, 8), (3, 1), (3, 2)]
