"""Collates samples into a micro-batch, and checks them while an error can name the sample.

Shape legend: B micro-batch, S sequence length, L tokens of one sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron.core.models.mimo.alignment import RowOrder, build_alignment_plan, media_span_ids
from megatron.core.models.mimo.errors import ConfigError, InputError, PlaceholderMismatchError
from megatron.mimo.data.media_format import MediaFormat, check_item, items_of, join_items
from megatron.mimo.data.sample import Sample


@dataclass(frozen=True, kw_only=True)
class PlacedSample:
    """A sample in a sequence.

    Attributes:
        sample: its tokens come first.
        start: position of the first of them.
        length: tokens and padding.
    """

    sample: Sample
    start: int
    length: int


@dataclass(frozen=True, kw_only=True)
class SampleCollator:
    """Turns samples into the micro-batch that ``MimoModel.forward`` takes.

    Attributes:
        seq_length: S; shorter samples are padded, longer ones are an error.
        vocab_size: token ids are below it (placeholder ids may be any).
        pad_id: fills ``input_ids`` behind a sample and ``labels`` wherever there is no label.
        special_token_ids: placeholder token id of each modality.
        media_formats: what each modality's media look like; where it has several encoders, one
            format for each, in the order of the model's ``encoders``.
        span_modalities: modalities whose items are spans: the tokens of an item see each other in
            both directions. The batch has ``span_ids`` if there are any.
        mrope: position ids are [3, B, S], for multimodal RoPE.
        plan_on_every_stage: later pipeline stages read the plan too, for levels of rows that their
            layers add.
        marks_padding: the batch says where its padding is, which experts' losses do not count.

    Raises:
        ConfigError: at construction, when the attributes do not fit each other.
    """

    seq_length: int
    vocab_size: int
    pad_id: int
    special_token_ids: Mapping[str, int]
    media_formats: Mapping[str, MediaFormat | Sequence[MediaFormat]]
    span_modalities: Sequence[str] = ()
    mrope: bool = False
    plan_on_every_stage: bool = False
    marks_padding: bool = False

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
        unknown = sorted(set(self.span_modalities) - set(self.media_formats))
        if unknown:
            raise ConfigError(
                f"span_modalities names {unknown}; expected some of {sorted(self.media_formats)}"
            )

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Collate ``samples`` (B of them, in order).

        Returns:
            ``input_ids``, ``labels`` int64 [B, S]; ``position_ids`` int64 [B, S] or [3, B, S];
            ``loss_mask`` float32 [B, S]; ``modality_inputs`` {modality: {encoder: {argument:
            [items, ...]}}} (tensors, or lists as ``MediaFormat`` says), items of the whole
            micro-batch in batch-major order, without the modalities that have none;
            ``alignment_plan``; ``padding_mask`` bool [B, S] where the collator ``marks_padding``;
            ``span_ids`` int32 [B, S] where there are span modalities. All on
            the host.

        Raises:
            InputError: a sample is malformed or too long; the message names it.
            PlaceholderMismatchError: its placeholders and media rows differ in number.
        """
        if not samples:
            raise InputError("a micro-batch of 0 samples; expected at least one")
        rows = [
            [PlacedSample(sample=sample, start=0, length=self.seq_length)] for sample in samples
        ]
        return self._fill(rows)

    def _fill(
        self, rows: Sequence[Sequence[PlacedSample]], *, length: int | None = None
    ) -> dict[str, Any]:
        """The micro-batch of rows that hold samples side by side, of ``seq_length`` or another."""
        shape_BS = (len(rows), length or self.seq_length)
        input_ids_BS = torch.full(shape_BS, self.pad_id, dtype=torch.int64)
        labels_BS = torch.full(shape_BS, self.pad_id, dtype=torch.int64)
        loss_mask_BS = torch.zeros(shape_BS, dtype=torch.float32)
        padding_mask_BS = torch.ones(shape_BS, dtype=torch.bool)
        position_ids_ABS = torch.zeros((3 if self.mrope else 1, *shape_BS), dtype=torch.int64)
        for row, places in enumerate(rows):
            for place in places:
                sample, start = place.sample, place.start
                behind = start + len(sample.token_ids)
                self._check_tokens(sample)
                self._check_media(sample)
                input_ids_BS[row, start:behind] = sample.token_ids
                padding_mask_BS[row, start:behind] = False
                # The last token of a sample has no label: what follows it is another's.
                is_label_L = sample.is_label[1:]
                labels_L = sample.token_ids[1:].where(is_label_L, self.pad_id)
                labels_BS[row, start : behind - 1] = labels_L
                loss_mask_BS[row, start : behind - 1] = is_label_L
                taken = slice(start, start + place.length)
                position_ids_ABS[:, row, taken] = self._positions_of(sample, place.length)
        samples = [place.sample for places in rows for place in places]
        plan = build_alignment_plan(
            input_ids_BS, dict(self.special_token_ids), row_order=self._row_order(samples)
        )
        batch = {
            "input_ids": input_ids_BS,
            "position_ids": position_ids_ABS if self.mrope else position_ids_ABS[0],
            "labels": labels_BS,
            "loss_mask": loss_mask_BS,
            "modality_inputs": self._stack_media(samples),
            "alignment_plan": plan,
        }
        if self.marks_padding:
            batch["padding_mask"] = padding_mask_BS
        if self.span_modalities:
            item_rows = {
                modality: [item.rows for one in samples for _, item in items_of(one, modality)]
                for modality in self.span_modalities
            }
            batch["span_ids"] = media_span_ids(plan, item_rows)
        return batch

    def _formats(self, modality: str) -> tuple[MediaFormat, ...]:
        formats = self.media_formats[modality]
        return (formats,) if isinstance(formats, MediaFormat) else tuple(formats)

    def _positions_of(self, sample: Sample, places: int) -> Tensor:
        """Position ids [1 or 3, places]; those behind the sample count on, as its answer would."""
        positions, length = sample.position_ids, len(sample.token_ids)
        if positions is None:
            return torch.arange(places)[None]
        fitting = [[length], [3, length]] if self.mrope else [[length]]
        if positions.dtype != torch.int64 or list(positions.shape) not in fitting:
            raise InputError(
                f"sample {sample.name}: position_ids are {positions.dtype} "
                f"{list(positions.shape)}; expected torch.int64 "
                f"{' or '.join(map(str, fitting))}"
                + ("" if self.mrope else " (mrope=True takes three axes)")
            )
        positions = positions.reshape(-1, length)
        following = positions.max() + 1 + torch.arange(places - length)
        return torch.cat([positions, following.expand(len(positions), -1)], dim=1)

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
            where = f"sample {sample.name}, media item {number}"
            if item.modality not in self.media_formats:
                raise InputError(
                    f"{where}: unknown modality '{item.modality}'; "
                    f"expected one of {sorted(self.media_formats)}"
                )
            check_item(where, item, self._formats(item.modality))
        for modality, token in self.special_token_ids.items():
            placeholders = int((sample.token_ids == token).sum())
            rows, blame = 0, None
            for number, item in items_of(sample, modality):
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

    def _stack_media(self, samples: Sequence[Sample]) -> dict[str, dict[str, dict[str, Any]]]:
        stacked: dict[str, dict[str, dict[str, Any]]] = {}
        for modality in self.media_formats:
            items = [item for sample in samples for _, item in items_of(sample, modality)]
            if not items:
                continue
            # An encoder without items, beside others with some, gets empty tensors and lists.
            stacked[modality] = {
                expected.encoder: join_items(
                    expected, [item for item in items if item.encoder == expected.encoder]
                )
                for expected in self._formats(modality)
            }
        return stacked

    def _row_order(self, samples: Sequence[Sample]) -> dict[str, RowOrder]:
        """For modalities of several encoders, whose rows are concatenated encoder by encoder."""
        orders = {}
        for modality in self.media_formats:
            encoders = tuple(expected.encoder for expected in self._formats(modality))
            if len(encoders) < 2:
                continue
            items = [item for sample in samples for _, item in items_of(sample, modality)]
            following = 0
            starts: dict[str, list[Tensor]] = {}
            for encoder in encoders:
                starts[encoder] = []
                for item in items:
                    if item.encoder == encoder:
                        starts[encoder].append(torch.arange(following, following + item.rows))
                        following += item.rows
            in_turn = {encoder: iter(rows) for encoder, rows in starts.items()}
            sources = [next(in_turn[item.encoder]) for item in items]
            sources_N = torch.cat(sources) if sources else torch.zeros(0, dtype=torch.int64)
            orders[modality] = RowOrder(sources_N=sources_N, encoders=encoders)
        return orders
