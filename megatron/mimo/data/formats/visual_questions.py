"""Questions to an image as Energon and data sets for evaluation have them.

{"image": "a.png", "context": "What is this?", "answers": ["A cat.", "cat"]}
{"image": "a.png", "question": "What is this?", "answer": "A cat."}
{"image": "a.png", "question": "What is this?", "answers": [{"answer": "A cat.", "answer_id": 1}],
 "multiple_choice_answer": "A cat."}
{"image": "a.png", "query": "What is this?", "label": ["A cat."], "human_or_machine": 0}

Of several answers the first is learned, or that with the largest of ``answer_weights``, or VQAv2's
``multiple_choice_answer``, which most have given. The last is ChartQA's form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

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
_MOST_GIVEN = "multiple_choice_answer"  # one of ``answers``


def _recognises(record: RawRecord) -> bool:
    asked, answered = _names(record.value)
    return any(key in record.value for key in asked) and any(
        key in record.value for key in answered
    )


def _names(value: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Under which keys question and answer may stand."""
    if "query" in value and "label" in value:
        return ("query",), ("label",)
    return _ASKED, ("answer", _MOST_GIVEN if value.get(_MOST_GIVEN) else "answers")


def _read(record: RawRecord, options: ReadingOptions) -> Conversation:
    asked, answered = _names(object_of(record))
    read = {*asked, *answered, "answer_weights", "system", *COLUMNS}
    read |= {"answers"} if _MOST_GIVEN in answered else set()
    given = known_keys(record.value, read, record.name, options.ignored)
    media = RecordMedia(record, COLUMNS)
    question = text_of(given, one_of(asked, given, record.name), record.name)
    answer = _answer(given, one_of(answered, given, record.name), record, options)
    turns = question_turns([(question, answer)], media, record.name)
    return conversation(record, given, turns, media, options)


def _answer(given: Mapping[str, Any], key: str, record: RawRecord, options: ReadingOptions) -> str:
    answers = given.get(key)
    if isinstance(answers, str):
        answers = [answers]
    elif _is_list(answers):
        answers = [_text(one, record, options) for one in answers]
    if not _is_list(answers) or not answers or not all(isinstance(one, str) for one in answers):
        raise InputError(f"{record.name}: {key!r} is {short(answers)}; expected text or a list")
    weights = given.get("answer_weights", [1] * len(answers))
    numbers = [one for one in weights if isinstance(one, int | float)] if _is_list(weights) else []
    if len(numbers) != len(answers):
        raise InputError(
            f"{record.name}: 'answer_weights' is {short(weights)}; expected a number for each of "
            f"{len(answers)} answers"
        )
    return text_of({key: answers[numbers.index(max(numbers))]}, key, record.name)


def _text(answer: Any, record: RawRecord, options: ReadingOptions) -> Any:
    """An answer that may say who gave it, as VQAv2's do."""
    if not isinstance(answer, Mapping):
        return answer
    read = {"answer", "answer_id", "answer_confidence"}
    return known_keys(answer, read, record.name, options.ignored).get("answer")


def _is_list(value: Any) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, list | tuple)


VISUAL_QUESTIONS = Format(
    name="visual-questions",
    summary="question (context) and answer (answers) + image (Energon's VQASample, VQAv2, ChartQA)",
    recognises=_recognises,
    read=_read,
)
