"""One record as training sees it: tokens with labels, media in small, or why there is no sample."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.data.bad_samples import BadSample
from megatron.mimo.data.chat.chat import Chat
from megatron.mimo.data.chat.media import read_medium
from megatron.mimo.data.conversation import ContentPart
from megatron.mimo.data.formats import RawRecord, detect, read_record
from megatron.mimo.data.media.source import EncodedMedium, shown
from megatron.mimo.data.reading.sample_reader import SampleReader
from megatron.mimo.data.sample import Sample
from megatron.mimo.inspection.thumbnails import Thumbnail, thumbnail

__all__ = ["Piece", "Seen", "look"]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Neighbouring tokens that are alike.

    Attributes:
        tokens: their ids.
        texts: what each stands for; their sum is the text where a character is one token.
        text: of all together.
        is_learned: the model has to predict them.
        modality: whose placeholders they are; None for text.
    """

    tokens: tuple[int, ...]
    texts: tuple[str, ...]
    text: str
    is_learned: bool
    modality: str | None


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What became of a record.

    Attributes:
        name: file and place.
        format_: name of its format; "" where none was told.
        pieces: of the sample, in order.
        thumbnails: of the media that could be decoded.
        rows: of each medium, with the modality.
        refusal: why there is no sample.
        cut_turns: that were cut away.
    """

    name: str
    format_: str = ""
    pieces: tuple[Piece, ...] = ()
    thumbnails: tuple[Thumbnail, ...] = ()
    rows: tuple[tuple[str, int], ...] = ()
    refusal: BadSample | None = None
    cut_turns: int = 0

    @property
    def length(self) -> int:
        """Tokens."""
        return sum(len(piece.tokens) for piece in self.pieces)

    @property
    def learned(self) -> int:
        """Tokens that are labels."""
        return sum(len(piece.tokens) for piece in self.pieces if piece.is_learned)


def look(record: RawRecord, reader: SampleReader, *, side: int = 0) -> Seen:
    """Read a record as training does.

    Args:
        record: one.
        reader: of training, with a policy that skips.
        side: pixels of the longer side of thumbnails; 0 for none.
    """
    seen = Seen(name=record.name)
    found = reader(record)
    try:
        item = read_record(record, reader.options)
        seen = replace(seen, format_=detect(record, reader.options.data_format).name)
    except InputError:
        item = None  # the reader has said why
    if item is not None and side:
        parts = (_thumbnail(part, reader.chat, side) for part in item.media)
        seen = replace(seen, thumbnails=tuple(one for one in parts if one is not None))
    if isinstance(found, BadSample):
        return replace(seen, refusal=found)
    return replace(
        seen,
        pieces=_pieces(found, reader.chat),
        rows=tuple((item.modality, item.rows) for item in found.media),
        cut_turns=found.cut_turns,
    )


def _pieces(sample: Sample, chat: Chat) -> tuple[Piece, ...]:
    tokenizer = chat.processor.tokenizer
    special = chat.family.media(chat.config).special_token_ids
    modalities = {token: name for name, token in special.items()}
    labelled = zip(sample.token_ids.tolist(), sample.is_label.tolist(), strict=True)
    pieces = []
    for (is_learned, modality), group in itertools.groupby(
        labelled, key=lambda pair: (pair[1], modalities.get(pair[0]))
    ):
        tokens = [token for token, _ in group]
        each: Sequence[Any] = [] if modality else [tokenizer.decode([token]) for token in tokens]
        text = "" if modality else tokenizer.decode(tokens)
        pieces.append(
            Piece(
                tokens=tuple(tokens),
                texts=tuple(str(one) for one in each),
                text=str(text),
                is_learned=is_learned,
                modality=modality,
            )
        )
    return tuple(pieces)


def _thumbnail(part: ContentPart, chat: Chat, side: int) -> Thumbnail | None:
    try:
        medium = read_medium(part, chat.processor, video_fps=chat.video_fps, limits=chat.limits)
    except (InputError, AttributeError):  # refused, or a processor that takes no such media
        return None
    value = part.value[0] if isinstance(part.value, tuple) else part.value
    name = shown(value) if isinstance(value, Path | EncodedMedium | str) else f"a {part.kind}"
    rate = getattr(getattr(chat.processor, "feature_extractor", None), "sampling_rate", 0)
    return thumbnail(part.kind, name, medium, side=side, rate=rate)
