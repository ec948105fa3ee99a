"""Alpaca's records: ``instruction``, ``input`` and ``output``, with media where there are any.

{"instruction": "What is this?", "input": "", "output": "A cat.", "images": ["a.png"]}
{"instruction": "What is this?", "context": "", "response": "A cat."}

The question is instruction and input with a line break between them; the model's chat template
writes it, not Alpaca's own text around it.
"""

from __future__ import annotations

from megatron.mimo.data.conversation import Conversation
from megatron.mimo.data.formats.conversing import conversation, object_of
from megatron.mimo.data.formats.keys import known_keys
from megatron.mimo.data.formats.marked_messages import COLUMNS
from megatron.mimo.data.formats.questions import history_of, one_of, question_turns, text_of
from megatron.mimo.data.formats.record import Format, RawRecord, ReadingOptions
from megatron.mimo.data.formats.record_media import RecordMedia

__all__ = ["ALPACA"]


_INPUTS = ("input", "context")  # the second of each is Dolly's
_OUTPUTS = ("output", "response")


def _recognises(record: RawRecord) -> bool:
    return "instruction" in record.value and any(key in record.value for key in _OUTPUTS)


def _read(record: RawRecord, options: ReadingOptions) -> Conversation:
    read = {"instruction", *_INPUTS, *_OUTPUTS, "system", "history", *COLUMNS}
    given = known_keys(object_of(record), read, record.name, options.ignored)
    media = RecordMedia(record, COLUMNS)
    said = [
        text_of(given, "instruction", record.name),
        text_of(given, one_of(_INPUTS, given, record.name), record.name, required=False),
    ]
    question = "\n".join(text for text in said if text)
    pairs = [
        *history_of(given, record.name),
        (question, text_of(given, one_of(_OUTPUTS, given, record.name), record.name)),
    ]
    return conversation(record, given, question_turns(pairs, media, record.name), media, options)


ALPACA = Format(
    name="alpaca",
    summary="instruction, input, output (+ images, history, system)",
    recognises=_recognises,
    read=_read,
)
