"""What is trained on: conversations of turns, and documents; both are made of parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["MEDIA_KINDS", "ContentPart", "Conversation", "Document", "Turn"]

MEDIA_KINDS = ("image", "video", "audio")


@dataclass(frozen=True, kw_only=True, eq=False)
class ContentPart:
    """A text or a medium in what a turn says.

    Attributes:
        kind: "text", or one of ``MEDIA_KINDS``.
        value: the text, the path of a media file, an ``EncodedMedium``, a list or tuple of these
            (a video's frames), or a decoded medium (a Pillow image, float32 [samples] at the
            processor's rate, a ``Video``, a list of Pillow images).
        settings: of a video's file, which frames are kept: attributes of ``FrameSampling``.
    """

    kind: str
    value: Any
    settings: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, eq=False)
class Turn:
    """What one side says.

    Attributes:
        role: "system", "user", "assistant" or "tool".
        content: its parts, in order.
        is_learned: False for a turn of the assistant's that is context only.
        learns_thinking: False where what stands in ``<think>`` is context only.
        fields: what chat templates write besides the content: tool_calls, reasoning_content ...
    """

    role: str
    content: tuple[ContentPart, ...]
    is_learned: bool = True
    learns_thinking: bool = True
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, eq=False)
class Conversation:
    """Turns, the last of them the assistant's.

    Attributes:
        name: says where they are from.
        turns: in order.
        tools: what the assistant may call, as chat templates take it.
    """

    name: str
    turns: tuple[Turn, ...]
    tools: tuple[Any, ...] = ()

    @property
    def media(self) -> list[ContentPart]:
        """Its parts that are media, in order."""
        return [part for turn in self.turns for part in turn.content if part.kind != "text"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Document:
    """Text with or without media, to be continued: no chat template writes it.

    Attributes:
        name: says where it is from.
        content: its parts, in order; what is text is learned.
        ends: False where the end was cut off, so that the model does not learn to stop there.
    """

    name: str
    content: tuple[ContentPart, ...]
    ends: bool = True

    @property
    def media(self) -> list[ContentPart]:
        """Its parts that are media, in order."""
        return [part for part in self.content if part.kind != "text"]
