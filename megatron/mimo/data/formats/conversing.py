"""Makes a conversation of the turns that a format has read, and refuses what cannot be learned."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.data.conversation import ContentPart, Conversation, Turn
from megatron.mimo.data.formats.keys import read_system, read_tools, short
from megatron.mimo.data.formats.record import RawRecord, ReadingOptions
from megatron.mimo.data.formats.record_media import RecordMedia

__all__ = ["conversation", "object_of", "text_turn", "turn_list"]

_THINKING = re.compile(r"<think>.*?</think>\s*", re.DOTALL)


def conversation(
    record: RawRecord,
    given: Mapping[str, Any],
    turns: Sequence[Turn],
    media: RecordMedia,
    options: ReadingOptions,
) -> Conversation:
    """The conversation of turns that were read.

    Args:
        record: that they are from.
        given: the keys that were read, ``system`` and ``tools`` among them.
        turns: in order.
        media: of the record; all have to have a place by now.
        options: which turns are learned.

    Raises:
        InputError: media without a place, nothing to learn, or media in what the assistant says.
    """
    media.refuse_left()
    turns = list(turns)
    system = read_system(given, record.name)
    if system is not None:
        if turns and turns[0].role == "system":
            raise InputError(
                f"{record.name}: has 'system' and a first turn of the system; keep one"
            )
        turns.insert(0, text_turn("system", system))
    turns = [_with_thinking(turn, options.thinking) for turn in turns]
    if options.learn == "last":
        turns = [*(replace(turn, is_learned=False) for turn in turns[:-1]), *turns[-1:]]
    tools = read_tools(given, record.name)
    return _checked(Conversation(name=record.name, turns=tuple(turns), tools=tools))


def text_turn(role: str, text: str, *, is_learned: bool = True) -> Turn:
    """A turn of text alone."""
    return Turn(
        role=role,
        content=(ContentPart(kind="text", value=text),),
        is_learned=is_learned and role == "assistant",
    )


def object_of(record: RawRecord) -> Mapping[str, Any]:
    """The value of a record, which has to be an object.

    Raises:
        InputError: it is no object.
    """
    if not isinstance(record.value, Mapping):
        raise InputError(f"{record.name}: expected an object, got {type(record.value).__name__}")
    return record.value


def turn_list(value: Any, key: str, name: str) -> list[Any]:
    """Turns under a key: a list, or one as JSON text.

    Raises:
        InputError: none of both, or an empty one.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise InputError(f"{name}: {key!r} is text that is not JSON: {error}") from error
    if not isinstance(value, list | tuple) or not value:
        raise InputError(f"{name}: {key!r} is {short(value)}; expected a list of turns")
    return list(value)


def _with_thinking(turn: Turn, thinking: str) -> Turn:
    """A turn whose ``<think>`` parts are learned, are context, or are left out."""
    if turn.role != "assistant" or thinking == "keep":
        return turn
    if thinking == "context":
        return replace(turn, learns_thinking=False)
    fields = {key: value for key, value in turn.fields.items() if key != "reasoning_content"}
    content = tuple(
        replace(part, value=_THINKING.sub("", part.value)) if part.kind == "text" else part
        for part in turn.content
    )
    return replace(turn, content=content, fields=fields)


def _checked(conversation: Conversation) -> Conversation:
    """Refuse what cannot be trained on."""
    name, turns = conversation.name, conversation.turns
    if not turns or turns[-1].role != "assistant":
        raise InputError(f"{name}: the last turn is not the assistant's; nothing to learn from it")
    if turns[0].role == "assistant":
        raise InputError(
            f"{name}: begins with the assistant, and chat templates begin with what it answers; "
            "delete that turn, or put before it what was said to it"
        )
    if not any(turn.is_learned for turn in turns if turn.role == "assistant"):
        raise InputError(
            f"{name}: no turn of the assistant's is learned (weight, loss, train, --learn last); "
            "leave the conversation out"
        )
    for number, turn in enumerate(turns):
        media = [part.kind for part in turn.content if part.kind != "text"]
        if media and turn.role == "assistant":
            raise InputError(
                f"{name}, message {number}: the assistant's turn holds {media}; a model that "
                "answers in text cannot be trained to give it"
            )
    return conversation
