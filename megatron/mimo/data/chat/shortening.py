"""Shortens conversations and documents that are too long; media are never cut.

A conversation loses rounds: a turn of the user's and all up to the next one. Rounds that hold media
stay, as do the system's turns. A document loses text behind its last medium, or before its first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from megatron.mimo.data.chat.chat import Chat
from megatron.mimo.data.conversation import ContentPart, Conversation, Document, Turn

__all__ = ["shortened"]


def shortened(
    item: Conversation | Document, length: int, longest: int, chat: Chat, *, from_front: bool
) -> tuple[Conversation | Document, int] | None:
    """A shortened item that fits, and how many turns it has lost; None where none would fit.

    Args:
        item: too long.
        length: its tokens.
        longest: tokens that it may have.
        chat: writes it.
        from_front: the oldest text goes first; otherwise the newest.
    """
    rows = length - chat.text_length(item)  # what media add, which stay
    if isinstance(item, Document):
        return _document(item, length - longest, chat, from_front=from_front)
    head, rounds = _rounds(item.turns)
    gone = 0
    while True:
        numbers = range(len(rounds)) if from_front else reversed(range(len(rounds)))
        number = next((one for one in numbers if not _has_media(rounds[one])), None)
        if number is None or len(rounds) == 1:
            return None
        gone += len(rounds.pop(number))
        turns = (*head, *(turn for one in rounds for turn in one))
        candidate = replace(item, turns=turns)
        if not any(turn.is_learned for turn in turns if turn.role == "assistant"):
            return None
        if chat.text_length(candidate) + rows <= longest:
            return candidate, gone


def _rounds(turns: Sequence[Turn]) -> tuple[list[Turn], list[list[Turn]]]:
    """What stands before the first question, and rounds that begin with one."""
    head: list[Turn] = []
    rounds: list[list[Turn]] = []
    for turn in turns:
        if turn.role == "user" and (not rounds or rounds[-1][-1].role != "user"):
            rounds.append([])
        (rounds[-1] if rounds else head).append(turn)
    return head, rounds


def _has_media(turns: Sequence[Turn]) -> bool:
    return any(part.kind != "text" for turn in turns for part in turn.content)


def _document(
    document: Document, surplus: int, chat: Chat, *, from_front: bool
) -> tuple[Document, int] | None:
    """A document without so many tokens of text at one of its ends."""
    tokenizer = chat.processor.tokenizer
    parts, gone = list(document.content), 0
    surplus += 2  # a text that is cut may be a token longer
    while parts and surplus > 0:
        place = 0 if from_front else -1
        part = parts[place]
        if part.kind != "text":
            return None
        found = tokenizer(part.value, return_offsets_mapping=True, add_special_tokens=False)
        offsets = found["offset_mapping"]
        gone += 1
        if len(offsets) <= surplus:
            parts.pop(place)
            surplus -= len(offsets)
            continue
        text: str = part.value
        text = text[offsets[surplus][0] :] if from_front else text[: offsets[-surplus][0]]
        parts[place] = ContentPart(kind="text", value=text)
        surplus = 0
    if not any(part.kind == "text" and part.value.strip() for part in parts):
        return None
    ends = document.ends and from_front
    return replace(document, content=tuple(parts), ends=ends), gone
