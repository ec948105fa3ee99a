"""From the JSON of a conversation, in either format of ``conversations``, to its turns."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.data.conversation import MEDIA_KINDS, ContentPart, Conversation, Turn
from megatron.mimo.data.conversation_keys import (
    FIELDS,
    known_keys,
    learned,
    read_settings,
    read_system,
    read_tools,
)
from megatron.mimo.data.media_source import shown

__all__ = ["check", "parse"]

_ROLES = ("system", "user", "assistant", "tool")
_SPEAKERS = {"system": "system", "human": "user", "user": "user"} | dict.fromkeys(
    ("gpt", "assistant"), "assistant"
)
_ADDRESS = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://")
_MARK = re.compile(r"\n?<(image|video|audio)>\n?")


def parse(entry: Any, name: str, folder: Path, *, ignored: Collection[str] = ()) -> Conversation:
    """One conversation of a file, in either format.

    Args:
        entry: decoded JSON.
        name: where it is from, for errors and for the sample.
        folder: what its paths are relative to.
        ignored: keys that are read over, whatever they mean.

    Raises:
        InputError: it is malformed, or has keys that are not of its format; the message begins
            with ``name``.
    """
    if not isinstance(entry, dict):
        raise InputError(f"{name}: expected an object, got {type(entry).__name__}")
    entry = {key: value for key, value in entry.items() if key not in ignored}
    _refuse_ignored(entry, name)
    if "messages" in entry:
        known_keys(entry, "conversation", name, ignored)
        turns = [
            _message(turn, f"{name}, message {number}", folder, ignored)
            for number, turn in enumerate(_list(entry, "messages", name))
        ]
    elif "conversations" in entry:
        known_keys(entry, "talk", name, ignored)
        turns = _llava_turns(entry, name, folder, ignored)
    else:
        raise InputError(
            f"{name}: has neither 'messages' nor 'conversations'; got the keys {sorted(entry)}"
        )
    system = read_system(entry, name)
    if system is not None:
        if turns[0].role == "system":
            raise InputError(f"{name}: has 'system' and a first turn of the system; keep one")
        turns.insert(0, Turn(role="system", content=(ContentPart(kind="text", value=system),)))
    tools = read_tools(entry, name)
    return check(Conversation(name=name, turns=tuple(turns), tools=tools))


def _refuse_ignored(entry: Mapping[str, Any], name: str) -> None:
    """Media under keys that are not read would be trained without."""
    kinds = () if "messages" in entry else MEDIA_KINDS
    names = [*MEDIA_KINDS, *(f"{kind}s" for kind in MEDIA_KINDS)]
    ignored = [key for key in names if key not in kinds and entry.get(key)]
    both = [key for key in ("messages", "conversations") if entry.get(key)]
    if len(both) > 1:
        raise InputError(f"{name}: has {both}, and one of them would not be read; keep one")
    if ignored:
        remedy = (
            f"name the files under {', '.join(repr(kind) for kind in kinds)}, each as one path or "
            "a list"
            if kinds
            else "media stand in the content of a message, as "
            '{"type": "image" (video, audio), "path": ...}'
        )
        raise InputError(f"{name}: {ignored} would not be read; {remedy}")


def check(conversation: Conversation) -> Conversation:
    """Refuse what cannot be trained on.

    Raises:
        InputError: nothing is said by the assistant, or the assistant's turns hold media.
    """
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
            f"{name}: no turn of the assistant's is learned (weight, loss, train); leave the "
            "conversation out"
        )
    for number, turn in enumerate(turns):
        media = [part.kind for part in turn.content if part.kind != "text"]
        if media and turn.role == "assistant":
            raise InputError(
                f"{name}, message {number}: the assistant's turn holds {media}; a model that "
                "answers in text cannot be trained to give it"
            )
    return conversation


def _message(turn: Any, name: str, folder: Path, ignored: Collection[str]) -> Turn:
    calls = isinstance(turn, dict) and bool(turn.get("tool_calls"))
    if (
        not isinstance(turn, dict)
        or turn.get("role") not in _ROLES
        or (turn.get("content") is None and not calls)
    ):
        raise InputError(
            f"{name}: expected an object with a role ({', '.join(_ROLES)}) and a content, got "
            f"{json.dumps(turn)[:80]}"
        )
    given = known_keys(turn, "message", name, ignored)
    content, role = given.get("content", ""), turn["role"]
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise InputError(f"{name}: content is {type(content).__name__}; expected text or a list")
    return Turn(
        role=role,
        content=tuple(_part(part, name, folder, ignored) for part in content),
        is_learned=learned(given, role, name),
        fields={key: given[key] for key in FIELDS if given.get(key)},
    )


def _part(part: Any, name: str, folder: Path, ignored: Collection[str]) -> ContentPart:
    kind: Any = part.get("type") if isinstance(part, dict) else None
    is_text = kind == "text" and isinstance(part.get("text"), str)
    if not is_text and kind not in MEDIA_KINDS:
        raise InputError(
            f"{name}: cannot read {json.dumps(part)[:80]}; expected "
            '{"type": "text", "text": ...} or {"type": "image" (video, audio), "path": ...}'
        )
    given = known_keys(part, kind, name, ignored)
    if is_text:
        return ContentPart(kind="text", value=part["text"])
    paths = [given[key] for key in ("path", kind) if key in given]
    if len(paths) > 1 and paths[0] != paths[1]:
        raise InputError(f'{name}: the {kind} has "path" and "{kind}", which differ; keep one')
    if paths and kind == "video" and _is_list_of_paths(paths[0]):
        frames = tuple(_local(path, "frame", name, folder) for path in paths[0])
        return ContentPart(kind=kind, value=frames, settings=read_settings(given, name))
    if not paths or not isinstance(paths[0], str):
        raise InputError(f'{name}: the {kind} has no "path" to a file; got {sorted(part)}')
    settings = read_settings(given, name) if kind == "video" else {}
    return ContentPart(kind=kind, value=_local(paths[0], kind, name, folder), settings=settings)


def _is_list_of_paths(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, str) for one in value)


def _local(path: str, kind: str, name: str, folder: Path) -> Path:
    if path.startswith("data:"):
        raise InputError(
            f"{name}: {kind} {path[:24]}... is data in place of a path; write it into a file and "
            "give its path"
        )
    if path.startswith("file://"):
        path = unquote(path.removeprefix("file://").removeprefix("localhost"))
    if address := _ADDRESS.match(path):
        raise InputError(
            f"{name}: {kind} {path[: address.end() + 60]} is on the network; download it and give "
            "its path (training does not wait for servers)"
        )
    if not path.strip() or "\0" in path:
        raise InputError(f"{name}: {kind} {path[:80]!r} is no path; give that of a file")
    return folder / path


def _llava_turns(
    entry: Mapping[str, Any], name: str, folder: Path, ignored: Collection[str]
) -> list[Turn]:
    waiting: dict[str, list[Path]] = {}
    for kind in MEDIA_KINDS:
        paths = entry.get(kind) or []
        paths = [paths] if isinstance(paths, str) else paths
        if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
            raise InputError(
                f"{name}: {kind!r} is {json.dumps(paths)[:80]}; expected a path or a list of paths"
            )
        waiting[kind] = [_local(path, kind, name, folder) for path in paths]
    turns = []
    for number, turn in enumerate(_list(entry, "conversations", name)):
        here = f"{name}, message {number}"
        speaker = turn.get("from") if isinstance(turn, dict) else None
        if (
            not isinstance(speaker, str)
            or speaker not in _SPEAKERS
            or not isinstance(turn.get("value"), str)
        ):
            raise InputError(
                f"{here}: expected an object with from ({', '.join(_SPEAKERS)}) and value, got "
                f"{json.dumps(turn)[:80]}"
            )
        role = _SPEAKERS[speaker]
        is_learned = learned(known_keys(turn, "turn", here, ignored), role, here)
        parts = _marked_parts(turn["value"], waiting, here)
        turns.append(Turn(role=role, content=parts, is_learned=is_learned))
    left = {kind: [shown(path) for path in paths] for kind, paths in waiting.items() if paths}
    if left:
        raise InputError(
            f"{name}: no turn has a place for {left}; each medium stands as <image>, <video> or "
            "<audio> in a value"
        )
    return turns


def _marked_parts(
    text: str, waiting: Mapping[str, list[Path]], name: str
) -> tuple[ContentPart, ...]:
    """Text with marks for media -> text and media; a line break beside a mark goes with it."""
    parts, at = [], 0
    for mark in _MARK.finditer(text):
        before, kind = text[at : mark.start()], mark[1]
        if before:
            parts.append(ContentPart(kind="text", value=before))
        if not waiting[kind]:
            raise InputError(f"{name}: <{kind}> without a file; {kind!r} names too few")
        parts.append(ContentPart(kind=kind, value=waiting[kind].pop(0)))
        at = mark.end()
    if text[at:] or not parts:
        parts.append(ContentPart(kind="text", value=text[at:]))
    return tuple(parts)


def _list(entry: Mapping[str, Any], key: str, name: str) -> list[Any]:
    value = entry[key]
    if not isinstance(value, list) or not value:
        raise InputError(f"{name}: {key!r} is {json.dumps(value)[:80]}; expected a list of turns")
    return value
