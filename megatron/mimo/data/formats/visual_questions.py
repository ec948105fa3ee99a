"""Questions to an image as Energon and data sets for evaluation have them.

{"image": "a.png", "context": "What is this?", "answers": ["A cat.", "cat"]}
{"image": "a.png", "question": "What is this?", "answer": "A cat."}
{"image": "a.png", "question": "What is this?", "answers": [{"answer": "A cat.", "answer_id": 1}]}

Of several answers the first is learned, or that with the largest of ``answer_weights``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.data.conversation import Conversation
from megatron.mimo.data.formats.conversing import conversation, object_of
from megatron.mimo.data.formats.keys import known_keys, short
from megatron.mimo.data.formats.marked_messages import COLUMNS
from megatron.mimo.data.formats.questions import one_of, question_turns, text_of
from megatron.mimo.data.formats.record import Format, RawRecord, ReadingOptions
from megatron.mimo.data.formats.record_media import RecordMedia

__all__ = ["VISUAL_QUESTIONS"]

_ASKED = ("question", "context", "problem")
_ANSWERED = ("answer", "answers")


def _recognises(record: RawRecord) -> bool:
    keys = set(record.value)
    return bool(keys & set(_ASKED)) and bool(keys & set(_ANSWERED))


def _read(record: RawRecord, options: ReadingOptions) -> Conversation:
    read = {*_ASKED, *_ANSWERED, "answer_weights", "system", *COLUMNS}
    given = known_keys(object_of(record), read, record.name, options.ignored)
    media = RecordMedia(record, COLUMNS)
    asked = one_of(_ASKED, given, record.name)
    pair = text_of(given, asked, record.name), _answer(given, record, options)
    return conversation(record, given, question_turns([pair], media, record.name), media, options)


def _answer(given: Mapping[str, Any], record: RawRecord, options: ReadingOptions) -> str:
    key = one_of(_ANSWERED, given, record.name)
    answers = given.get(key)
    if isinstance(answers, list | tuple):
        answers = [_text(one, record, options) for one in answers]
    if isinstance(answers, str):
        return text_of(given, key, record.name)
    if (
        not isinstance(answers, list | tuple)
        or not answers
        or not all(isinstance(one, str) for one in answers)
    ):
        raise InputError(f"{record.name}: {key!r} is {short(answers)}; expected text or a list")
    weights = given.get("answer_weights")
    if weights is None:
        return str(answers[0])
    numbers = [one for one in weights if isinstance(one, int | float)] if _is_list(weights) else []
    if len(numbers) != len(answers):
        raise InputError(
            f"{record.name}: 'answer_weights' is {short(weights)}; expected a number for each of "
            f"{len(answers)} answers"
        )
    return str(answers[numbers.index(max(numbers))])


def _text(answer: Any, record: RawRecord, options: ReadingOptions) -> Any:
    """An answer that may say who gave it, as VQAv2's do."""
    if not isinstance(answer, Mapping):
        return answer
    read = {"answer", "answer_id", "answer_confidence"}
    return known_keys(answer, read, record.name, options.ignored).get("answer")


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


VISUAL_QUESTIONS = Format(
    name="visual-questions",
    summary="question (context) and answer (answers) + image (Energon's VQASample)",
    recognises=_recognises,
    read=_read,
)
