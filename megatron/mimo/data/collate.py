"""From samples to one micro-batch, with every check that is cheapest where the sample is known.

Shape legend: B micro-batch, S sequence length, L tokens of one sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron.core.models.mimo.alignment import build_alignment_plan
from megatron.core.models.mimo.errors import ConfigError, InputError, PlaceholderMismatchError
from megatron.mimo.data.sample import MediaItem, Sample


@dataclass(frozen=True, kw_only=True)
class MediaFormat:
    """What the media of one modality look like.

    Attributes:
        encoder: the encoder that takes them; the rows of a modality come from one encoder, as
            two would interleave their rows in another order than the placeholders.
        inputs: dtype and shape, without batch dimension, of each of the encoder's arguments.
    """

    encoder: str
    inputs: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True, kw_only=True)
class SampleCollator:
    """Turns samples into the micro-batch that ``MimoModel.forward`` takes.

    Attributes:
        seq_length: S; shorter samples are padded, longer ones are an error.
        vocab_size: token ids are below it (placeholder ids may be any).
        pad_id: fills ``input_ids`` behind a sample and ``labels`` wherever there is no label.
        special_token_ids: placeholder token id of each modality.
        media_formats: what each modality's media look like.

    Raises:
        ConfigError: at construction, when the attributes do not fit each other.
    """

    seq_length: int
    vocab_size: int
    pad_id: int
    special_token_ids: Mapping[str, int]
    media_formats: Mapping[str, MediaFormat]

    def __post_init__(self) -> None:
        if self.seq_length < 1:
            raise ConfigError(f"seq_length is {self.seq_length}; expected at least 1")
        if not 0 <= self.pad_id < self.vocab_size:
            raise ConfigError(
                f"pad_id {self.pad_id} is outside the vocabulary; "
                f"expected 0 <= pad_id < {self.vocab_size}"
            )
        if self.pad_id in self.special_token_ids.values():
            raise ConfigError(f"pad_id {self.pad_id} is also a placeholder; choose another id")
        if self.special_token_ids.keys() != self.media_formats.keys():
            raise ConfigError(
                f"special_token_ids names {sorted(self.special_token_ids)} and media_formats "
                f"{sorted(self.media_formats)}; expected the same modalities"
            )

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Collate ``samples`` (B of them, in order).

        Returns:
            ``input_ids``, ``position_ids``, ``labels`` int64 [B, S]; ``loss_mask`` float32 [B, S];
            ``modality_inputs`` {modality: {encoder: {argument: [items, ...]}}}, items of the whole
            micro-batch in batch-major order, without the modalities that have none;
            ``alignment_plan``. All on the host.

        Raises:
            InputError: a sample is malformed or too long; the message names it.
            PlaceholderMismatchError: its placeholders and media rows differ in number.
        """
        if not samples:
            raise InputError("a micro-batch of 0 samples; expected at least one")
        shape_BS = (len(samples), self.seq_length)
        input_ids_BS = torch.full(shape_BS, self.pad_id, dtype=torch.int64)
        labels_BS = torch.full(shape_BS, self.pad_id, dtype=torch.int64)
        loss_mask_BS = torch.zeros(shape_BS, dtype=torch.float32)
        for row, sample in enumerate(samples):
            self._check_tokens(sample)
            self._check_media(sample)
            ids_L, length = sample.token_ids, len(sample.token_ids)
            input_ids_BS[row, :length] = ids_L
            is_label_L = sample.is_label[1:]
            labels_BS[row, : length - 1] = ids_L[1:].where(is_label_L, self.pad_id)
            loss_mask_BS[row, : length - 1] = is_label_L
        return {
            "input_ids": input_ids_BS,
            "position_ids": torch.arange(self.seq_length).repeat(len(samples), 1),
            "labels": labels_BS,
            "loss_mask": loss_mask_BS,
            "modality_inputs": self._stack_media(samples),
            "alignment_plan": build_alignment_plan(input_ids_BS, dict(self.special_token_ids)),
        }

    def _check_tokens(self, sample: Sample) -> None:
        """Refuse token ids and flags that no model of this vocabulary and length can take."""
        where = f"sample {sample.name}"
        ids_L, is_label_L = sample.token_ids, sample.is_label
        for title, tensor, dtype in (
            ("token_ids", ids_L, torch.int64),
            ("is_label", is_label_L, torch.bool),
        ):
            if tensor.dtype != dtype or tensor.ndim != 1 or len(tensor) != len(ids_L):
                raise InputError(
                    f"{where}: {title} is {tensor.dtype} {list(tensor.shape)}; expected {dtype} "
                    f"[length], with as many entries as token_ids"
                )
        length = len(ids_L)
        if length == 0:
            raise InputError(f"{where}: no tokens; expected at least one")
        if length > self.seq_length:
            tail = ids_L[self.seq_length :]
            lost = sum(int((tail == token).sum()) for token in self.special_token_ids.values())
            raise InputError(
                f"{where}: {length} tokens, {length - self.seq_length} more than seq_length "
                f"{self.seq_length} ({lost} of the surplus are placeholders, whose media would "
                "lose rows); raise --seq-length or shorten the sample"
            )
        placeholder_L = torch.zeros_like(is_label_L)
        for token in self.special_token_ids.values():
            placeholder_L |= ids_L == token
        bad_L = ((ids_L < 0) | (ids_L >= self.vocab_size)) & ~placeholder_L
        if bad_L.any():
            at = int(bad_L.nonzero()[0])
            raise InputError(
                f"{where}: token {at} has id {int(ids_L[at])}; "
                f"expected 0 <= id < {self.vocab_size}, or a placeholder of "
                f"{dict(self.special_token_ids)}"
            )
        if (placeholder_L & is_label_L).any():
            at = int((placeholder_L & is_label_L).nonzero()[0])
            raise InputError(
                f"{where}: token {at} is a placeholder and is marked as a label; a model cannot "
                "predict an embedding row: clear its is_label flag"
            )

    def _check_media(self, sample: Sample) -> None:
        """Refuse media of another format, or with other row counts than placeholders."""
        for number, item in enumerate(sample.media):
            self._check_item(f"sample {sample.name}, media item {number}", item)
        for modality, token in self.special_token_ids.items():
            placeholders = int((sample.token_ids == token).sum())
            rows, blame = 0, None
            for number, item in _items(sample, modality):
                rows += item.rows
                if blame is None and rows > placeholders:
                    blame = number, item.rows, placeholders - (rows - item.rows)
            if rows == placeholders:
                continue
            where = f"sample {sample.name}: "
            if blame is None:
                text = f"no media item is left for the last {placeholders - rows} of them"
            else:
                text = f"media item {blame[0]} needs {blame[1]} and finds {blame[2]}"
            raise PlaceholderMismatchError(
                f"{where}{placeholders} placeholders (token {token}) for modality '{modality}', "
                f"but its media yield {rows} rows; {text}. Expected one placeholder per row",
                modality=modality,
                placeholders=placeholders,
                rows=rows,
            )

    def _check_item(self, where: str, item: MediaItem) -> None:
        expected = self.media_formats.get(item.modality)
        if expected is None:
            raise InputError(
                f"{where}: unknown modality '{item.modality}'; "
                f"expected one of {sorted(self.media_formats)}"
            )
        if item.encoder != expected.encoder:
            raise InputError(
                f"{where}: encoder '{item.encoder}'; expected '{expected.encoder}', the encoder "
                f"of modality '{item.modality}'"
            )
        if item.rows < 1:
            raise InputError(f"{where}: yields {item.rows} rows; expected at least one")
        if item.inputs.keys() != expected.inputs.keys():
            raise InputError(
                f"{where}: inputs {sorted(item.inputs)}; expected {sorted(expected.inputs)}"
            )
        for name, (dtype, shape) in expected.inputs.items():
            tensor = item.inputs[name]
            if tensor.dtype != dtype or tuple(tensor.shape) != shape:
                raise InputError(
                    f"{where}: {name} is {tensor.dtype} {list(tensor.shape)}; "
                    f"expected {dtype} {list(shape)}"
                )

    def _stack_media(self, samples: Sequence[Sample]) -> dict[str, dict[str, dict[str, Tensor]]]:
        stacked: dict[str, dict[str, dict[str, Tensor]]] = {}
        for modality, expected in self.media_formats.items():
            items = [item for sample in samples for _, item in _items(sample, modality)]
            if items:
                arguments = {
                    name: torch.stack([item.inputs[name] for item in items])
                    for name in expected.inputs
                }
                stacked[modality] = {expected.encoder: arguments}
        return stacked


def _items(sample: Sample, modality: str) -> Iterator[tuple[int, MediaItem]]:
    """The sample's media of one modality, each with its place among all the sample's media."""
    return (pair for pair in enumerate(sample.media) if pair[1].modality == modality)
