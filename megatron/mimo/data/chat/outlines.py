"""Outlines of renderings: with them a conversation is rendered by its chat template only once.

To find where each answer begins, the template has to write the messages before it, with and
without the beginning of an answer: two renderings for each answer. But what a template writes
around the texts depends on the roles and the kinds of parts alone. This outline is remembered for
each shape of conversation, and filled with the texts of others. Templates may also look for a word
in a text, such as ``/no_think``, and write something else then: conversations that hold what the
template looks for are rendered in full.
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
_PROBE = "Probe{}Text"  # stands for a text; templates write it unchanged
_SOUGHT = re.compile(
    r"""(['"])((?:(?!\1).)+)\1\s+(?:not\s+)?in\b"""
    r"""|\.(?:startswith|endswith|r?split|r?partition|r?find|count)\(\s*(['"])((?:(?!\3).)+)\3"""
)
_GAP = re.compile(r"Probe(\d+)Text")


class _Render(Protocol):
    def __call__(self, messages: _Messages, /, *, asks: bool) -> str: ...


class Outlines:
    """The outlines of one template, by the roles of messages and the kinds of their parts.

    Args:
        template: its source.
    """

    def __init__(self, template: str) -> None:
        found = {one[2] or one[4] for one in _SOUGHT.finditer(template)}
        self._sought = [
            one for one in found if not one.isidentifier()
        ]  # identifiers are keys of messages
        self._known: dict[tuple[Any, ...], _Outline | None] = {}

    def beginnings(
        self, messages: _Messages, render: _Render, *, uses_tools: bool
    ) -> Callable[[int, bool], str]:
        """A function of (number of messages, asks): the first messages as they would be rendered,
        with ``asks`` up to where the assistant begins to speak.

        The whole conversation is rendered. If it equals its outline filled with the texts (as they
        are, or stripped of white space), its beginnings come from their outlines as well; otherwise
        each is rendered when it is asked for.

        Args:
            messages: roles and contents; with further fields (calls, reasoning) no outline is used.
            render: renders messages; with ``asks`` up to where the assistant begins to speak.
            uses_tools: tools are offered; then no outline is used.
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
        rendered: of messages with probes for texts; each probe holds the number of its text.
    """

    def __init__(self, rendered: str) -> None:
        self._pieces = _GAP.split(rendered)
        self._numbers = [int(number) for number in self._pieces[1::2]]

    def filled(self, texts: Sequence[str]) -> str:
        """The rendering with these texts in the gaps."""
        pieces = self._pieces.copy()
        pieces[1::2] = [texts[number] for number in self._numbers]
        return "".join(pieces)


def _outline(messages: _Messages, asks: bool, render: _Render) -> _Outline | None:
    """The outline of these messages; None where the template refuses the probes."""
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
