"""Text in which ``<image>``, ``<video>`` and ``<audio>`` stand for media.

``<img>a.png</img>`` names an image where it stands, as the first Qwen-VL's data do.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from megatron.mimo.data.conversation import MEDIA_KINDS, ContentPart
from megatron.mimo.data.formats.record_media import RecordMedia

__all__ = ["marked_parts", "media_first", "names_no_medium"]

_MARK = re.compile(r"\n?<(image|video|audio)>\n?|<img>([^<>\n]+)</img>")


def marked_parts(text: str, media: RecordMedia, name: str) -> tuple[ContentPart, ...]:
    """Text with marks -> text and media; a line break beside a mark goes with it.

    Raises:
        InputError: more marks than media.
    """
    parts, at = [], 0
    for mark in _MARK.finditer(text):
        before = text[at : mark.start()]
        if before:
            parts.append(ContentPart(kind="text", value=before))
        parts.append(media.take(mark[1], name) if mark[1] else media.part("image", mark[2], name))
        at = mark.end()
    if text[at:] or not parts:
        parts.append(ContentPart(kind="text", value=text[at:]))
    return tuple(parts)


def names_no_medium(texts: Sequence[str]) -> bool:
    """Whether no text has a mark."""
    return not any(_MARK.search(text) for text in texts)


def media_first(media: RecordMedia, name: str) -> tuple[ContentPart, ...]:
    """All media without a place yet, for a record whose texts have no marks."""
    return tuple(media.take(kind, name) for kind in MEDIA_KINDS for _ in range(media.waiting(kind)))
