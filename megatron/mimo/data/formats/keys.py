"""Keys of records, turns and media: which are read, which mean nothing, which are refused.

A key may change what is learned. Therefore each is honoured, or known to say nothing about the text
(``id``, ``source``), or refused by name; none is passed over in silence.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from typing import Any

from megatron.core.models.mimo.errors import InputError

__all__ = [
    "FIELDS",
    "LEARNED",
    "SETTINGS",
    "known_keys",
    "learned",
    "read_list",
    "read_settings",
    "read_system",
    "read_tools",
    "short",
]

# Fields of a turn that its chat template writes.
FIELDS = ("tool_calls", "tool_call_id", "reasoning_content", "name")
# Keys with which formats say whether a turn is learned; all mean the same.
LEARNED = ("weight", "loss", "train", "trainable")
_MOST = 1e9  # seconds, frames
SETTINGS = ("fps", "nframes", "video_start", "video_end")

# Where a conversation is from and how it is filed.
_ORIGINS = frozenset(
    (
        *("id", "idx", "index", "uid", "uuid", "_id", "key", "source", "sources", "dataset"),
        *("dataset_name", "data_source", "origin", "url", "license", "split", "subset"),
        *("category", "task", "domain", "topic", "tags", "lang", "language", "model", "created"),
        *("created_at", "date", "timestamp", "ts", "version", "meta", "metadata", "info"),
        *("comment", "note", "width", "height", "image_width", "image_height", "question_id"),
        *("question_type", "image_id", "video_id", "audio_id", "sample_id", "conversation_id"),
        *("message_id", "num_turns", "length", "duration", "parallel_tool_calls"),
        *("prompt_id", "answer_type", "width_list", "height_list", "hash", "md5", "sha256"),
        "human_or_machine",  # who has asked, of ChartQA
        *("imgid", "img_id", "cocoid", "sentid", "sentids"),  # of COCO's and Flickr's captions
        *("speaker_id", "chapter_id", "client_id", "gender", "age", "accent", "locale"),
        # img2dataset's
        *("status", "error_message", "original_width", "original_height", "exif", "similarity"),
        *("punsafe", "pwatermark", "NSFW", "LICENSE", "aesthetic", "AESTHETIC_SCORE", "WIDTH"),
        *("HEIGHT", "URL"),
        # FineVision's
        *("relevance_ratings", "relevance_min", "formatting_ratings", "formatting_min"),
        *("visual_dependency_ratings", "visual_dependency_min"),
        *("image_correspondence_ratings", "image_correspondence_min"),
    )
)
_REMEDIES: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("min_pixels", "max_pixels", "total_pixels", "resized_height", "resized_width", "detail"),
        "the processor sizes all media of a run alike: set the sizes in preprocessor_config.json",
    ),
    (
        ("fps", "nframes", "video_start", "video_end", "min_frames", "max_frames"),
        f"a video takes {', '.join(SETTINGS)}, each beside its path in a part of a message",
    ),
    (
        (
            *("rejected", "chosen", "rejected_response", "rejected_messages", "label", "kto_tag"),
            *("rejected_images", "margin", "positive_messages", "negative_messages"),
        ),
        "preferences are not trained on: give the answer to learn as the assistant's turn",
    ),
    (("functions", "function_call"), "give functions as tools and calls as tool_calls"),
    (("reasoning", "thinking", "thought"), "give it as reasoning_content"),
    (
        ("weight", "loss", "train", "trainable", "loss_mask", "mask"),
        "say it in the turn that it is about, as weight (0 or 1), loss, train or trainable",
    ),
    (("system", "tools"), "they stand beside the turns"),
    (
        ("image", "video", "audio", "images", "videos", "audios"),
        "a record names its media in one way: in the parts of its messages, or beside its turns "
        "under the keys of its format (docs/data.md)",
    ),
)


def known_keys(
    given: Mapping[str, Any], read: Collection[str], name: str, ignored: Collection[str]
) -> dict[str, Any]:
    """The keys that a format reads, with their values; others are refused.

    Dropped are keys that are ignored, empty, or known to mean nothing.

    Args:
        given: a record, or an object in one.
        read: keys that its format reads.
        name: of the object, for errors.
        ignored: keys that ``--ignore-keys`` names.

    Raises:
        InputError: a key that the format does not read.
    """
    meant = {
        key: value
        for key, value in given.items()
        if key not in ignored
        and value is not None
        and not (_is_empty(value) and key not in read)
        and not str(key).startswith("__")  # what WebDataset adds
    }
    unknown = sorted(str(key) for key in set(meant) - set(read) - _ORIGINS)
    if unknown:
        remedies = [text for keys, text in _REMEDIES if set(keys) & set(unknown) - set(read)] or [
            "rename or delete it"
        ]
        raise InputError(
            f"{name}: {_listed(unknown)} would not be read, and may change what is learned; "
            f"{'; '.join(remedies)}, or leave it out knowingly with --ignore-keys "
            f"{' '.join(unknown)[:200]}"
        )
    return {key: value for key, value in meant.items() if key in read}


def learned(turn: Mapping[str, Any], role: str, name: str) -> bool:
    """Whether a turn is learned: as one of ``LEARNED`` says, by default the assistant's turns.

    Raises:
        InputError: a value that is neither yes nor no, two that contradict each other, or a turn
            of another role that is to be learned.
    """
    said = {key: turn[key] for key in LEARNED if key in turn}
    for key, value in said.items():
        if isinstance(value, bool) or (isinstance(value, int | float) and value in (0, 1)):
            continue
        raise InputError(
            f"{name}: {key!r} is {short(value)}; a turn is learned (true, 1) or not (false, 0), "
            "with nothing between"
        )
    if not said:
        return role == "assistant"
    values = {bool(value) for value in said.values()}
    if len(values) > 1:
        raise InputError(f"{name}: {said} contradict each other; keep one of them")
    wanted = values.pop()
    if wanted and role != "assistant" and any(key != "weight" for key in said):
        raise InputError(
            f"{name}: {said} of a turn of the {role}; only what the assistant says is learned: "
            "leave it out"
        )
    return wanted and role == "assistant"


def read_settings(part: Mapping[str, Any], name: str) -> dict[str, float]:
    """Which frames of a video are taken: ``fps`` or ``nframes``, ``video_start``, ``video_end``.

    Raises:
        InputError: no sensible numbers.
    """
    settings: dict[str, float] = {}
    for key in SETTINGS:
        if part.get(key) is None:
            continue
        value, least = part[key], 0 if key.startswith("video") else None
        good = isinstance(value, int | float) and not isinstance(value, bool)
        good = good and abs(value) < _MOST and (value > 0 if least is None else value >= least)
        if not good or (key == "nframes" and value != int(value)):
            wanted = "frames" if key == "nframes" else "frames per second" if least is None else "s"
            raise InputError(f"{name}: {key!r} is {short(value)}; expected a number of {wanted}")
        settings[key] = value
    if "fps" in settings and "nframes" in settings:
        raise InputError(f"{name}: has 'fps' and 'nframes', which exclude each other; keep one")
    if settings.get("video_end", math.inf) <= settings.get("video_start", 0):
        raise InputError(
            f"{name}: the video starts at {settings.get('video_start', 0)} s and ends at "
            f"{settings['video_end']} s; expected it to end later"
        )
    return settings


def read_list(given: Mapping[str, Any], key: str, name: str) -> list[Any]:
    """A list under a key; empty where there is none.

    Raises:
        InputError: something else.
    """
    value = given.get(key)
    if value is None:
        return []
    if not isinstance(value, list | tuple):
        raise InputError(f"{name}: {key!r} is {short(value)}; expected a list")
    return list(value)


def read_system(entry: Mapping[str, Any], name: str) -> str | None:
    """What ``system`` beside the turns says; it comes before them.

    Raises:
        InputError: no text.
    """
    system = entry.get("system")
    if system is None or system == "":
        return None
    if not isinstance(system, str):
        raise InputError(f"{name}: 'system' is {short(system)}; expected text")
    return system


def read_tools(entry: Mapping[str, Any], name: str) -> tuple[Any, ...]:
    """``tools``: a list of objects, or one as JSON text.

    Raises:
        InputError: none of both.
    """
    tools = entry.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise InputError(f"{name}: 'tools' is text that is not JSON: {error}") from error
    if not tools:
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise InputError(f"{name}: 'tools' is {short(tools)}; expected a list of objects")
    return tuple(tools)


def short(value: Any) -> str:
    """A value of a record as errors show it."""
    return json.dumps(value, default=lambda other: f"<{type(other).__name__}>", skipkeys=True)[:80]


def _is_empty(value: Any) -> bool:
    return isinstance(value, str | list | dict) and not value


def _listed(names: list[str]) -> str:
    text = str(names)
    return text if len(text) <= 200 else f"{text[:200]}..."
