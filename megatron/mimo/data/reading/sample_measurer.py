"""Measures a record's sample, its tokens and its media's rows, without decoding the media.

The header of a medium tells its shape: an image's size, how many frames of a video are kept, how
many samples a recording has. What the processor writes for a medium depends on its shape alone, and
is learned from a blank one, once for each shape. The text that results is tokenized as the
processor does. Records of which headers do not tell this (MP3, bad or too long ones) are read as
training reads them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.data.bad_samples import BadSample
from megatron.mimo.data.chat.media import length_of_recording, shape_of_video
from megatron.mimo.data.conversation import ContentPart, Conversation, Turn
from megatron.mimo.data.formats import RawRecord, read_record
from megatron.mimo.data.measure import Measure, measure_of
from megatron.mimo.data.media.files import Video
from megatron.mimo.data.media.image_sizes import image_size
from megatron.mimo.data.reading.length_steps import LengthSteps
from megatron.mimo.data.reading.sample_reader import SampleReader
from megatron.mimo.data.reading.timed import Timed
from megatron.mimo.data.sample import Sample

__all__ = ["SampleMeasurer"]

_SHAPES = 4096  # whose replacements are remembered

_Shape = tuple[Any, ...]  # kind of medium, and numbers


@dataclass(frozen=True)
class _Replacement:
    """What the processor writes for a medium of one shape.

    Of each run of equal placeholders only one is kept in ``by``, to tokenize less: a placeholder
    is a token of its own, so that the tokens around a run do not depend on its length.
    """

    mark: str
    by: str
    left_out: int  # placeholders that were dropped from ``by``
    modality: str
    rows: int


@dataclass(frozen=True, kw_only=True, eq=False)
class SampleMeasurer:
    """Measures records.

    Attributes:
        reader: reads what headers cannot tell.
        by_reading: read every record as training does.
    """

    reader: SampleReader
    by_reading: bool = False
    _known: dict[_Shape, _Replacement | None] = field(default_factory=dict)
    _timed: list[Timed] = field(default_factory=list, init=False, repr=False)

    def __call__(self, record: RawRecord) -> Measure | BadSample:
        """The measure of a record's sample; a ``BadSample`` where there is none.

        Raises:
            InputError: as ``SampleReader``.
        """
        found = None if self.by_reading else self._from_headers(record)
        if found is not None and found.length <= self.reader.seq_length:
            return found
        sample = self.reader(record)
        return measure_of(sample) if isinstance(sample, Sample) else sample

    def _from_headers(self, record: RawRecord) -> Measure | None:
        """The measure; None where headers do not tell it, for whatever reason: reading says why."""
        try:
            item, chat = read_record(record, self.reader.options), self.reader.chat
            shapes = [self._shape(part, item.name) for part in item.media]
            media = [self._replacement(shape) for shape in shapes if shape is not None]
            known = [one for one in media if one is not None]
            if len(known) < len(item.media):
                return None
            length = chat.text_length(item, lambda text: _with_media(text, known))
            length += sum(one.left_out for one in known)
        except Exception:  # noqa: BLE001 - whatever it is, reading meets it and reports it
            return None
        return Measure(length, tuple((one.modality, one.rows) for one in known))

    def _shape(self, part: ContentPart, name: str) -> _Shape | None:
        """What a medium's text depends on; None where only reading tells."""
        chat, seconds = self.reader.chat, self.reader.policy.sample_timeout
        if part.kind == "image":
            size = image_size(part.value, chat.limits)
            return None if size is None else ("image", *size)
        if part.kind == "audio":
            length = length_of_recording(part, chat.processor, limits=chat.limits)
            return None if length is None else ("audio", length)
        read = partial(shape_of_video, video_fps=chat.video_fps, limits=chat.limits)
        if seconds is None:
            shape = read(part)
        else:  # the first frame is decoded
            if not self._timed:
                self._timed.append(Timed(read, seconds))
            shape = self._timed[0](part, name)
        return None if shape is None else ("video", *shape)

    def _replacement(self, shape: _Shape) -> _Replacement | None:
        """What the processor writes for this shape; None where it writes it in several places."""
        if shape[0] == "audio":
            return self._recordings(shape[1])
        if shape not in self._known:
            if len(self._known) >= _SHAPES:
                self._known.pop(next(iter(self._known)))
            self._known[shape] = self._probe(shape)
        return self._known[shape]

    @cached_property
    def _recordings(self) -> LengthSteps:
        return LengthSteps(lambda length: self._probe(("audio", length)))

    def _probe(self, shape: _Shape) -> _Replacement | None:
        medium = ContentPart(kind=shape[0], value=_blank(shape))
        question = (medium, ContentPart(kind="text", value="What is this?"))
        answer = (ContentPart(kind="text", value="An answer."),)
        turns = (Turn(role="user", content=question), Turn(role="assistant", content=answer))
        probe = Conversation(name=f"a blank {shape}", turns=turns)
        replaced = self.reader.chat.replacements(probe)
        sample = self.reader.chat.sample(probe)
        if len(replaced) != 1:
            return None
        by, left_out = replaced[0].by, 0
        for placeholder in self._placeholders():
            run = re.compile(f"(?:{re.escape(placeholder)}){{2,}}")
            shorter = run.sub(placeholder, by)
            left_out += (len(by) - len(shorter)) // len(placeholder)
            by = shorter
        return _Replacement(
            mark=replaced[0].mark,
            by=by,
            left_out=left_out,
            modality=sample.media[0].modality,
            rows=sum(item.rows for item in sample.media),
        )

    def _placeholders(self) -> list[str]:
        """Placeholders that the tokenizer never joins with the text around them."""
        chat = self.reader.chat
        tokenizer = chat.processor.tokenizer
        added = tokenizer.added_tokens_decoder
        ids = chat.family.media(chat.config).special_token_ids.values()
        plain = [
            one for one in ids if one in added and not (added[one].lstrip or added[one].rstrip)
        ]
        return [str(text) for text in tokenizer.convert_ids_to_tokens(plain)]


def _blank(shape: _Shape) -> Any:
    """A medium of this shape."""
    from PIL import Image

    if shape[0] == "image":
        _, width, height = shape
        return Image.new("RGB", (int(width), int(height)))
    if shape[0] == "audio":
        return np.zeros(shape[1], dtype=np.float32)
    _, frames, height, width, fps = shape
    frames_THWC = np.zeros((int(frames), int(height), int(width), 3), dtype=np.uint8)
    return Video(frames_THWC=frames_THWC, fps=fps)


def _with_media(text: str, media: list[_Replacement]) -> str:
    """The text in which each mark of a medium is replaced.

    Raises:
        InputError: it has more or fewer marks.
    """
    whole = ""
    for one in media:
        before, mark, text = text.partition(one.mark)
        if not mark:
            raise InputError(f"the text has fewer than {len(media)} marks of media")
        whole += before + one.by
    if any(one.mark in text for one in media):
        raise InputError(f"the text has more than {len(media)} marks of media")
    return whole + text
