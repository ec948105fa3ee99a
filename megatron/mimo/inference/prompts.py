"""Prompts of different lengths as batches that end together.

Prompts are padded on the left: the last token of all of them is at the same place, so that one
cache with one length serves the batch. Rotary embeddings rotate by differences of places, which
padding on the left does not change; learned and multimodal positions are given explicitly.

Legend: B prompts, P places of the longest prompt, L places of prompt and answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron.core.models.mimo.alignment import AlignmentPlan, Stream, build_alignment_plan
from megatron.core.models.mimo.config.base_configs import TEXT
from megatron.core.models.mimo.errors import InputError
from megatron.mimo.data import SampleCollator
from megatron.mimo.data.micro_batches.batch import Batch, Collator, keep_for_stage
from megatron.mimo.data.micro_batches.broadcast import move
from megatron.mimo.data.sample import Sample

__all__ = [
    "PromptBatch",
    "check_prompts",
    "collate_prompts",
    "group_prompts",
    "on_device",
    "text_plan",
]


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptBatch:
    """Prompts that are worked on together, on the host.

    Attributes:
        input_ids: int64 [B, P].
        position_ids: int64 [B, L] or [3, B, L].
        padding_BL: bool [B, L], True at the places before a prompt; None where there are none.
        span_ids: integer [B, P], or None.
        modality_inputs: of all prompts.
        plan: of the prompts.
        lengths: tokens of each prompt.
    """

    input_ids: Tensor
    position_ids: Tensor
    padding_BL: Tensor | None
    span_ids: Tensor | None
    modality_inputs: Mapping[str, Any]
    plan: AlignmentPlan
    lengths: tuple[int, ...]

    @property
    def places(self) -> int:
        """P."""
        return self.input_ids.size(1)


def check_prompts(prompts: Sequence[Sample], max_length: int | None) -> None:
    """Refuse prompts that leave no room for an answer.

    Raises:
        InputError: no tokens, or as many as the model takes.
    """
    for prompt in prompts:
        length = len(prompt.token_ids)
        if length == 0:
            raise InputError(f"{prompt.name}: an empty prompt; expected at least one token")
        if max_length is not None and length >= max_length:
            raise InputError(
                f"{prompt.name}: a prompt of {length} tokens leaves no room for an answer within "
                f"{max_length} positions; shorten it, or raise the limit where the model allows "
                "(--seq-length in training)"
            )


def group_prompts(lengths: Sequence[int], size: int, *, padded: bool) -> list[list[int]]:
    """Which prompts share a batch: their numbers, the longest prompts first.

    Args:
        lengths: of the prompts.
        size: prompts in a batch, at most.
        padded: prompts of different lengths may share one.
    """
    order = sorted(range(len(lengths)), key=lambda number: (-lengths[number], number))
    groups: list[list[int]] = []
    for number in order:
        group = groups[-1] if groups else []
        fits = group and (padded or lengths[group[0]] == lengths[number])
        if fits and len(group) < size:
            group.append(number)
        else:
            groups.append([number])
    return groups


def collate_prompts(
    prompts: Sequence[Sample],
    collate: Collator,
    *,
    special_token_ids: Mapping[str, int],
    answer_length: int,
    max_length: int | None,
    three_axes: bool,
) -> PromptBatch:
    """Make one batch of prompts, padded on the left, with positions for the answers too.

    Args:
        prompts: B samples without answers.
        collate: the model's collator of training, which pads on the right.
        special_token_ids: placeholder token id of each modality.
        answer_length: how many tokens an answer may have.
        max_length: size of the model's table of positions; None where it has none.
        three_axes: the model has multimodal RoPE, with positions (time, height, width).

    Raises:
        InputError: what the collator refuses.
    """
    lengths = [len(prompt.token_ids) for prompt in prompts]
    P = max(lengths)
    if type(collate) is SampleCollator:
        collate = replace(collate, seq_length=P)
    batch: Batch = collate(prompts)
    shifts = [P - length for length in lengths]
    input_ids_BP = _moved_right(batch["input_ids"][:, :P], shifts)
    given = batch["position_ids"]
    given_ABS = given if given.dim() == 3 else given[None]
    positions_ABL = torch.stack(
        [
            _positions(given_ABS[:, row, :length], P, answer_length)
            for row, length in enumerate(lengths)
        ],
        dim=1,
    )
    if max_length is not None and not three_axes:
        # a table of positions ends there; answers that are over are carried along in their batch
        positions_ABL = positions_ABL.clamp(max=max_length - 1)
    padding_BL = None
    if any(shifts):
        places_L = torch.arange(P + answer_length)
        padding_BL = places_L[None] < torch.tensor(shifts)[:, None]
    span_ids = batch.get("span_ids")
    return PromptBatch(
        input_ids=input_ids_BP,
        position_ids=positions_ABL.expand(3, -1, -1) if three_axes else positions_ABL[0],
        padding_BL=padding_BL,
        span_ids=None if span_ids is None else _moved_right(span_ids[:, :P], shifts),
        modality_inputs=batch["modality_inputs"],
        plan=build_alignment_plan(
            input_ids_BP, special_token_ids, row_order=batch["alignment_plan"].row_order()
        ),
        lengths=tuple(lengths),
    )


def on_device(
    batch: PromptBatch, device: torch.device, dtype: torch.dtype, *, embeds: bool
) -> PromptBatch:
    """The batch for one pipeline stage.

    Args:
        batch: on the host.
        device: of the model.
        dtype: of the model's parameters: what media become that are of a floating dtype.
        embeds: the stage has the embedding and the encoders; others are given no media.
    """
    media = keep_for_stage(
        {"modality_inputs": batch.modality_inputs},
        pre_process=embeds,
        post_process=False,
        dtype=dtype,
    )
    parts = {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids.contiguous(),
        "padding_BL": batch.padding_BL,
        "span_ids": batch.span_ids,
        "modality_inputs": media.get("modality_inputs", {}),
        "plan": batch.plan,
    }
    return replace(batch, **move(parts, device))


def text_plan(tokens_B: Tensor) -> AlignmentPlan:
    """The plan of one token of text for each sequence; nothing is read from the device."""
    return AlignmentPlan(
        sequence_length=1,
        batch_size=len(tokens_B),
        text_ids_N=tokens_B,
        streams={TEXT: Stream(rows_N=torch.arange(len(tokens_B), device=tokens_B.device))},
    )


def _moved_right(rows_BP: Tensor, shifts: Sequence[int]) -> Tensor:
    """Each prompt rolled to the right, so that its padding stands before it."""
    return torch.stack([row.roll(shift) for row, shift in zip(rows_BP, shifts, strict=True)])


def _positions(positions_AN: Tensor, places: int, answer_length: int) -> Tensor:
    """Positions [A, L] of one prompt and the answer, which counts on from the last token.

    Frames of a slow video may have larger positions than the text behind them.
    """
    axes, length = positions_AN.shape
    following = positions_AN[:, -1].max() + 1 + torch.arange(answer_length)
    before = torch.zeros(axes, places - length, dtype=positions_AN.dtype)
    return torch.cat([before, positions_AN, following.expand(axes, -1)], dim=1)
