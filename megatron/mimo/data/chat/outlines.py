"""What a chat template writes around texts, so that one rendering of a conversation is enough.

Where an answer begins follows from how the template writes what stands before it, which would take
two renderings for each answer. Templates depend on roles and kinds of parts and put texts where
they belong as they are, so that what is written for others of the same shape tells the rest. Some
look for a mark in a text, such as ``/no_think``, and write something else where an answer begins:
conversations with what a template looks for are rendered each time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import Any, Protocol

from megatron.core.models.mimo.errors import InputError

__all__ = ["Outlines"]

_Messages = Sequence[Mapping[str, Any]]

_SHAPES = 1024  # that are remembered
_PROBE = "Probe{}Text"  # for a text; templates leave it as it is
_SOUGHT = re.compile(
    r"""(['"])((?:(?!\1).)+)\1\s+(?:not\s+)?in\b"""
    r"""|\.(?:startswith|endswith|r?split|r?partition|r?find|count)\(\s*(['"])((?:(?!\3).)+)\3"""
)
_GAP = re.compile(r"Probe(\d+)Text")


class _Render(Protocol):
    def __call__(self, messages: _Messages, /, *, asks: bool) -> str: ...


class Outlines:
    """What one template writes for messages, by their roles and the kinds of their parts.

    Args:
        template: its source.
    """

    def __init__(self, template: str) -> None:
        found = {one[2] or one[4] for one in _SOUGHT.finditer(template)}
        self._sought = [one for one in found if not one.isidentifier()]  # those are keys
        self._known: dict[tuple[Any, ...], _Outline | None] = {}

    def beginnings(
        self, messages: _Messages, render: _Render, *, uses_tools: bool
    ) -> Callable[[int, bool], str]:
        """The text of the first so many of these messages, up to where the assistant begins to
        speak or not, each as it would be rendered.

        The whole is rendered. If it is its outline filled with the texts, as they are or without
        white space around them, so are its beginnings; else each is rendered when it is asked for.

        Args:
            messages: roles and contents; with more, as calls and reasoning, no outline is used.
            render: has the template write messages; ``asks`` up to where the assistant begins.
            uses_tools: tools are offered, which are written as they are; likewise.
        """
        given = [part["text"] for message in messages for part in _texts(message)]
        has_more = uses_tools or any(len(message) > 2 for message in messages)
        has_more = has_more or any(one in text for text in given for one in self._sought)
        shapes = [(one["role"], *(part["type"] for part in one["content"])) for one in messages]

        def outline(many: int, asks: bool) -> _Outline | None:
            key = (asks, *shapes[:many])
            if has_more:
                return None
            if key not in self._known:
                if len(self._known) == _SHAPES:
                    return None
                self._known[key] = _outline(messages[:many], asks, render)
            return self._known[key]

        whole, known = render(messages, asks=False), outline(len(messages), False)
        fitting = given
        if known is not None and known.filled(given) != whole:
            fitting = [text.strip() for text in given]
            known = known if known.filled(fitting) == whole else None

        def beginning(many: int, asks: bool) -> str:
            if many == len(messages) and not asks:
                return whole
            found = known and outline(many, asks)
            return found.filled(fitting) if found else render(messages[:many], asks=asks)

        return beginning


class _Outline:
    """A rendering with gaps for texts.

    Args:
        rendered: with probes, each holding the number of the text in its place.
    """

    def __init__(self, rendered: str) -> None:
        self._pieces = _GAP.split(rendered)
        self._numbers = [int(number) for number in self._pieces[1::2]]

    def filled(self, texts: Sequence[str]) -> str:
        """It with these texts."""
        pieces = self._pieces.copy()
        pieces[1::2] = [texts[number] for number in self._numbers]
        return "".join(pieces)


def _outline(messages: _Messages, asks: bool, render: _Render) -> _Outline | None:
    """None where the template refuses other texts."""
    numbers = count()
    probes = [
        {
            **message,
            "content": [
                {**part, "text": _PROBE.format(next(numbers))} if part["type"] == "text" else part
                for part in message["content"]
            ],
        }
        for message in messages
    ]
    try:
        return _Outline(render(probes, asks=asks))
    except InputError:
        return None


def _texts(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [part for part in message["content"] if part["type"] == "text"]
