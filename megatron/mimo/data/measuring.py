"""How long a record's sample will be, found out without decoding its media.

An image's header says its size, and its size says what the processor puts in its place: a blank
image of that size shows it, once for each size. The text that results is tokenized, as the
processor does. What this cannot tell (videos, recordings, records that are bad or too long) is
read as training reads it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.data.bad_samples import BadSample
from megatron.mimo.data.balance import Measure
from megatron.mimo.data.conversation import ContentPart, Conversation, Turn
from megatron.mimo.data.formats import RawRecord, read_record
from megatron.mimo.data.image_sizes import Size, image_size
from megatron.mimo.data.sample import Sample
from megatron.mimo.data.sample_reader import SampleReader

__all__ = ["SampleMeasurer", "check_measure", "measure_of"]

_SIZES = 4096  # whose replacements are remembered


@dataclass(frozen=True)
class _Replacement:
    """What an image of one size becomes: a text, of whose runs of one placeholder one is left.

    Placeholders are tokens of their own: that there is one is all that the text around it knows.
    """

    mark: str
    by: str
    left_out: int  # placeholders that ``by`` lacks
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
    _known: dict[Size, _Replacement] = field(default_factory=dict)

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
        """None where they do not tell; why is for the reader to say."""
        try:
            item, chat = read_record(record, self.reader.options), self.reader.chat
            if any(part.kind != "image" for part in item.media):
                return None
            sizes = [image_size(part.value, chat.limits) for part in item.media]
            images = [self._replacement(size) for size in sizes if size is not None]
            if len(images) < len(item.media):
                return None
            length = chat.text_length(item, lambda text: _with_images(text, images))
            length += sum(one.left_out for one in images)
        except Exception:  # noqa: BLE001 - whatever it is, reading meets it and reports it
            return None
        return Measure(length, tuple((one.modality, one.rows) for one in images))

    def _replacement(self, size: Size) -> _Replacement:
        if size not in self._known:
            if len(self._known) >= _SIZES:
                self._known.pop(next(iter(self._known)))
            self._known[size] = self._probe(size)
        return self._known[size]

    def _probe(self, size: Size) -> _Replacement:
        from PIL import Image

        image = ContentPart(kind="image", value=Image.new("RGB", size))
        question = (image, ContentPart(kind="text", value="What is this?"))
        answer = (ContentPart(kind="text", value="An image."),)
        turns = (Turn(role="user", content=question), Turn(role="assistant", content=answer))
        probe = Conversation(name=f"an image of {size}", turns=turns)
        replaced = self.reader.chat.replacements(probe)
        sample = self.reader.chat.sample(probe)
        if len(replaced) != 1:
            raise InputError(f"an image of {size} is replaced {len(replaced)} times; expected once")
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
        """Tokens that stand for rows and that the tokenizer never joins with what is around."""
        chat = self.reader.chat
        tokenizer = chat.processor.tokenizer
        added = tokenizer.added_tokens_decoder
        ids = chat.family.media(chat.config).special_token_ids.values()
        plain = [
            one for one in ids if one in added and not (added[one].lstrip or added[one].rstrip)
        ]
        return [str(text) for text in tokenizer.convert_ids_to_tokens(plain)]


def _with_images(text: str, images: list[_Replacement]) -> str:
    """The text in which each mark of an image is replaced.

    Raises:
        InputError: it has more or fewer marks.
    """
    whole = ""
    for one in images:
        before, mark, text = text.partition(one.mark)
        if not mark:
            raise InputError(f"the text has fewer than {len(images)} marks of images")
        whole += before + one.by
    if images and images[0].mark in text:
        raise InputError(f"the text has more than {len(images)} marks of images")
    return whole + text


def measure_of(sample: Sample) -> Measure:
    """The measure of a sample that has been read."""
    return Measure(
        len(sample.token_ids), tuple((item.modality, item.rows) for item in sample.media)
    )


def check_measure(sample: Sample, expected: Measure) -> None:
    """Refuse a sample that is not as long as it was planned to be.

    Raises:
        InputError: the lengths differ.
    """
    found = len(sample.token_ids)
    if found != expected.length:
        raise InputError(
            f"{sample.name}: {found} tokens, and it was measured as {expected.length}; its files "
            "have changed, or the processor looks at more than an image's size: give "
            "--measure-by-reading"
        )
