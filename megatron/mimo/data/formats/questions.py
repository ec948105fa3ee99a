"""What formats of one question and its answer share: texts, earlier questions, turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.data.conversation import Turn
from megatron.mimo.data.formats.conversing import text_turn
from megatron.mimo.data.formats.keys import short
from megatron.mimo.data.formats.marked_messages import names_none, without_marks
from megatron.mimo.data.formats.marks import marked_parts
from megatron.mimo.data.formats.record_media import RecordMedia

__all__ = ["history_of", "one_of", "question_turns", "text_of"]


def one_of(keys: Sequence[str], given: Mapping[str, Any], name: str) -> str:
    """Which of several keys with the same meaning a record has; the first, if it has none.

    Raises:
        InputError: it has two.
    """
    found = [key for key in keys if key in given]
    if len(found) > 1:
        raise InputError(f"{name}: has {found}, and one of them would not be read; keep one")
    return found[0] if found else keys[0]


def text_of(given: Mapping[str, Any], key: str, name: str, *, required: bool = True) -> str:
    """Text under a key.

    Raises:
        InputError: the value is no text, or is missing where it is required.
    """
    value = given.get(key)
    if value is None and not required:
        return ""
    if not isinstance(value, str) or (required and not value.strip()):
        raise InputError(f"{name}: {key!r} is {short(value)}; expected text")
    return value


def history_of(given: Mapping[str, Any], name: str) -> list[tuple[str, str]]:
    """``history``: pairs of earlier questions and answers.

    Raises:
        InputError: something else.
    """
    pairs = given.get("history") or []
    good = isinstance(pairs, list | tuple) and all(
        isinstance(pair, list | tuple)
        and len(pair) == 2
        and all(isinstance(text, str) for text in pair)
        for pair in pairs
    )
    if not good:
        raise InputError(
            f"{name}: 'history' is {short(pairs)}; expected a list of [question, answer]"
        )
    return [(pair[0], pair[1]) for pair in pairs]


def question_turns(pairs: Sequence[tuple[str, str]], media: RecordMedia, name: str) -> list[Turn]:
    """Turns of questions and answers; marks in questions stand for media.

    Raises:
        InputError: more marks than media.
    """
    had_media = media.has_waiting
    turns = []
    for question, answer in pairs:
        parts = marked_parts(question, media, name)
        turns.append(Turn(role="user", content=parts, is_learned=False))
        turns.append(text_turn("assistant", answer))
    return without_marks(turns, media, name) if had_media and names_none(turns) else turns
