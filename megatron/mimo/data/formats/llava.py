r"""LLaVA's JSON: ``conversations`` and the media under ``image``, ``video``, ``audio``.

{"image": "a.png", "conversations": [{"from": "human", "value": "<image>\nWhat is this?"},
                                     {"from": "gpt", "value": "A cat."}]}
{"image": {"<image_00>": "a.png", "<image_01>": "b.png"},
 "conversations": [{"role": "user", "content": "<image_01> What is this?"}, ...]}

The second is MiniCPM-V's form.
"""

from __future__ import annotations

from megatron.mimo.data.conversation import MEDIA_KINDS, Conversation
from megatron.mimo.data.formats.conversing import conversation, object_of, turn_list
from megatron.mimo.data.formats.keys import known_keys
from megatron.mimo.data.formats.named_media import with_plain_marks
from megatron.mimo.data.formats.record import Format, RawRecord, ReadingOptions
from megatron.mimo.data.formats.record_media import RecordMedia
from megatron.mimo.data.formats.spoken import spoken_turns

__all__ = ["LLAVA"]

_KEY = "conversations"


def _recognises(record: RawRecord) -> bool:
    return _KEY in record.value and any(record.value.get(kind) for kind in MEDIA_KINDS)


def _read(record: RawRecord, options: ReadingOptions) -> Conversation:
    read = {_KEY, "system", "tools", *MEDIA_KINDS}
    given = known_keys(object_of(record), read, record.name, options.ignored)
    turns = turn_list(given.get(_KEY), _KEY, record.name)
    record, marked = with_plain_marks(record, turns)
    media = RecordMedia(record, {kind: kind for kind in MEDIA_KINDS})
    spoken = spoken_turns(marked, record, media, options)
    return conversation(record, given, spoken, media, options)


LLAVA = Format(
    name="llava",
    summary="conversations of from and value + image, video, audio (LLaVA)",
    recognises=_recognises,
    read=_read,
)
