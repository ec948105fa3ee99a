r"""Conversations with media in them, from files of JSON.

Two formats, told apart by their keys, each as JSON Lines (one conversation per line) or as one
JSON list:

    {"messages": [{"role": "user", "content": [{"type": "image", "path": "a.png"},
                                               {"type": "text", "text": "What is this?"}]},
                  {"role": "assistant", "content": "A cat."}]}
    {"image": "a.png", "conversations": [{"from": "human", "value": "<image>\nWhat is this?"},
                                         {"from": "gpt", "value": "A cat."}]}

Paths are relative to the folder of the file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from megatron.core.models.mimo.errors import InputError

__all__ = ["MEDIA_KINDS", "Conversation", "ConversationFile", "Part", "Turn"]

MEDIA_KINDS = ("image", "video", "audio")
_ROLES = ("system", "user", "assistant")
_SPEAKERS = {"system": "system", "human": "user", "user": "user"} | dict.fromkeys(
    ("gpt", "assistant"), "assistant"
)
_MARK = re.compile(r"\n?<(image|video|audio)>\n?")


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """A piece of a turn.

    Attributes:
        kind: "text", or one of ``MEDIA_KINDS``.
        value: the text, the path of a media file, or a decoded medium (a Pillow image, float32
            [samples] at the processor's rate, a ``Video``).
    """

    kind: str
    value: Any


@dataclass(frozen=True, kw_only=True, eq=False)
class Turn:
    """What one side says; ``role`` is "system", "user" or "assistant"."""

    role: str
    parts: tuple[Part, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Conversation:
    """Turns, the last of them the assistant's; ``name`` says where they are from."""

    name: str
    turns: tuple[Turn, ...]


class ConversationFile(Sequence[Conversation]):
    """The conversations of one file, parsed when they are asked for.

    Args:
        path: ``.jsonl``, or ``.json`` with a list.

    Raises:
        InputError: the file cannot be read, is not a list, or has no conversations; in
            ``__getitem__``, one that is malformed: file, line (or entry) and what is wrong.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        try:
            if self.path.suffix == ".json":
                self._entries = self._read_list()
                self._lines: list[tuple[int, int]] = []
            else:
                self._entries = []
                self._lines = self._find_lines()
        except OSError as error:
            raise InputError(f"{self.path} cannot be read: {error.strerror}") from error
        if not len(self):
            raise InputError(f"{self.path} has no conversations; expected one per line")

    def __len__(self) -> int:
        return len(self._entries) or len(self._lines)

    @overload
    def __getitem__(self, index: int) -> Conversation: ...
    @overload
    def __getitem__(self, index: slice) -> list[Conversation]: ...
    def __getitem__(self, index: int | slice) -> Conversation | list[Conversation]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if self._entries:
            return parse(self._entries[index], f"{self.path}, entry {index + 1}", self.path.parent)
        number, offset = self._lines[index]
        name = f"{self.path}, line {number}"
        with self.path.open("rb") as file:
            file.seek(offset)
            line = file.readline()
        try:
            entry = json.loads(line.rstrip())
        except ValueError as error:
            raise InputError(f"{name}: {_not_json(error)}; repair or delete it") from error
        return parse(entry, name, self.path.parent)

    def _read_list(self) -> list[Any]:
        try:
            entries = json.loads(self.path.read_bytes())
        except ValueError as error:
            raise InputError(f"{self.path}: not valid JSON: {error}; repair it") from error
        if not isinstance(entries, list):
            raise InputError(
                f"{self.path}: expected a list of conversations, got {type(entries).__name__}; "
                "a file with one conversation per line is called .jsonl"
            )
        return entries

    def _find_lines(self) -> list[tuple[int, int]]:
        """Number and offset of each line that is not blank."""
        lines, offset = [], 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    lines.append((number, offset))
                offset += len(line)
        return lines


def parse(entry: Any, name: str, folder: Path) -> Conversation:
    """One conversation of a file, in either format.

    Args:
        entry: decoded JSON.
        name: where it is from, for errors and for the sample.
        folder: what its paths are relative to.

    Raises:
        InputError: it is malformed; the message begins with ``name``.
    """
    if not isinstance(entry, dict):
        raise InputError(f"{name}: expected an object, got {type(entry).__name__}")
    _refuse_ignored(entry, name)
    if "messages" in entry:
        turns = [
            _message(turn, f"{name}, message {number}", folder)
            for number, turn in enumerate(_list(entry, "messages", name))
        ]
    elif "conversations" in entry:
        turns = _llava_turns(entry, name, folder)
    else:
        raise InputError(
            f"{name}: has neither 'messages' nor 'conversations'; got the keys {sorted(entry)}"
        )
    return check(Conversation(name=name, turns=tuple(turns)))


def _refuse_ignored(entry: Mapping[str, Any], name: str) -> None:
    """Media under keys that are not read would be trained without."""
    kinds = () if "messages" in entry else MEDIA_KINDS
    names = [*MEDIA_KINDS, *(f"{kind}s" for kind in MEDIA_KINDS)]
    ignored = [key for key in names if key not in kinds and entry.get(key)]
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
    for number, turn in enumerate(turns):
        media = [part.kind for part in turn.parts if part.kind != "text"]
        if media and turn.role == "assistant":
            raise InputError(
                f"{name}, message {number}: the assistant's turn holds {media}; a model that "
                "answers in text cannot be trained to give it"
            )
    return conversation


def _message(turn: Any, name: str, folder: Path) -> Turn:
    if not isinstance(turn, dict) or turn.get("role") not in _ROLES or "content" not in turn:
        raise InputError(
            f"{name}: expected an object with a role ({', '.join(_ROLES)}) and a content, got "
            f"{json.dumps(turn)[:80]}"
        )
    content = turn["content"]
    if isinstance(content, str):
        return Turn(role=turn["role"], parts=(Part(kind="text", value=content),))
    if not isinstance(content, list):
        raise InputError(f"{name}: content is {type(content).__name__}; expected text or a list")
    return Turn(role=turn["role"], parts=tuple(_part(part, name, folder) for part in content))


def _part(part: Any, name: str, folder: Path) -> Part:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return Part(kind="text", value=part["text"])
    if kind not in MEDIA_KINDS:
        raise InputError(
            f"{name}: cannot read {json.dumps(part)[:80]}; expected "
            '{"type": "text", "text": ...} or {"type": "image" (video, audio), "path": ...}'
        )
    path = part.get("path", part.get(kind))
    if not isinstance(path, str):
        raise InputError(f'{name}: the {kind} has no "path" to a file; got {sorted(part)}')
    return Part(kind=kind, value=_local(path, kind, name, folder))


def _local(path: str, kind: str, name: str, folder: Path) -> Path:
    if path.startswith(("http://", "https://")):
        raise InputError(
            f"{name}: {kind} {path} is on the network; download it and give its path (training "
            "does not wait for servers)"
        )
    return folder / path.removeprefix("file://")


def _llava_turns(entry: Mapping[str, Any], name: str, folder: Path) -> list[Turn]:
    waiting: dict[str, list[Path]] = {}
    for kind in MEDIA_KINDS:
        paths = entry.get(kind) or []
        paths = [paths] if isinstance(paths, str) else paths
        if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
            raise InputError(f"{name}: {kind!r} is {paths!r}; expected a path or a list of paths")
        waiting[kind] = [_local(path, kind, name, folder) for path in paths]
    turns = []
    for number, turn in enumerate(_list(entry, "conversations", name)):
        here = f"{name}, message {number}"
        speaker = turn.get("from") if isinstance(turn, dict) else None
        if speaker not in _SPEAKERS or not isinstance(turn.get("value"), str):
            raise InputError(
                f"{here}: expected an object with from ({', '.join(_SPEAKERS)}) and value, got "
                f"{json.dumps(turn)[:80]}"
            )
        parts = _marked_parts(turn["value"], waiting, here)
        turns.append(Turn(role=_SPEAKERS[speaker], parts=parts))
    left = {kind: [str(path) for path in paths] for kind, paths in waiting.items() if paths}
    if left:
        raise InputError(
            f"{name}: no turn has a place for {left}; each medium stands as <image>, <video> or "
            "<audio> in a value"
        )
    return turns


def _marked_parts(text: str, waiting: Mapping[str, list[Path]], name: str) -> tuple[Part, ...]:
    """Text with marks for media -> text and media; a line break beside a mark goes with it."""
    parts, at = [], 0
    for mark in _MARK.finditer(text):
        before, kind = text[at : mark.start()], mark[1]
        if before:
            parts.append(Part(kind="text", value=before))
        if not waiting[kind]:
            raise InputError(f"{name}: <{kind}> without a file; {kind!r} names too few")
        parts.append(Part(kind=kind, value=waiting[kind].pop(0)))
        at = mark.end()
    if text[at:] or not parts:
        parts.append(Part(kind="text", value=text[at:]))
    return tuple(parts)


def _not_json(error: ValueError) -> str:
    """What is wrong with one line; the decoder's own words count lines from the line."""
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON: {error.msg} at character {error.pos + 1}"
    return f"not valid JSON: {error}"


def _list(entry: Mapping[str, Any], key: str, name: str) -> list[Any]:
    value = entry[key]
    if not isinstance(value, list) or not value:
        raise InputError(f"{name}: {key!r} is {value!r}; expected a list of turns")
    return value
