"""Finds the format of a record, by its keys or as ``--data-format`` says, and reads it."""

from __future__ import annotations

from dataclasses import replace

from megatron.core.models.mimo.errors import ConfigError, InputError
from megatron.mimo.data.conversation import Conversation, Document
from megatron.mimo.data.formats.alpaca import ALPACA
from megatron.mimo.data.formats.conversing import object_of
from megatron.mimo.data.formats.documents import CAPTIONS, TEXT
from megatron.mimo.data.formats.exchanges import EXCHANGES
from megatron.mimo.data.formats.interleaved import INTERLEAVED
from megatron.mimo.data.formats.llava import LLAVA
from megatron.mimo.data.formats.marked_messages import MARKED_MESSAGES
from megatron.mimo.data.formats.messages import MESSAGES
from megatron.mimo.data.formats.named_media import with_columns
from megatron.mimo.data.formats.prompt_completion import PROMPT_COMPLETION
from megatron.mimo.data.formats.record import Format, RawRecord, ReadingOptions
from megatron.mimo.data.formats.sharegpt import SHAREGPT
from megatron.mimo.data.formats.swift import SWIFT
from megatron.mimo.data.formats.visual_questions import VISUAL_QUESTIONS

__all__ = ["FORMATS", "detect", "read_record"]

# The first format that recognises a record reads it: those that ask for more keys come first.
FORMATS: tuple[Format, ...] = (
    *(SWIFT, MARKED_MESSAGES, MESSAGES, LLAVA, SHAREGPT, ALPACA, PROMPT_COMPLETION),
    *(VISUAL_QUESTIONS, EXCHANGES, INTERLEAVED, CAPTIONS, TEXT),
)
_BY_NAME = {one.name: one for one in FORMATS}
# Keys of turns; a record may have one of them.
_TURNS = ("messages", "conversations", "conversation")


def detect(record: RawRecord, data_format: str | None = None) -> Format:
    """The format of a record.

    Args:
        record: an object.
        data_format: name of the format that it has to have; None to look.

    Raises:
        ConfigError: there is no format of that name.
        InputError: no format has these keys, or the record has those of two.
    """
    if data_format is not None:
        if data_format not in _BY_NAME:
            raise ConfigError(
                f"--data-format {data_format}: there is no such format; expected one of "
                f"{', '.join(_BY_NAME)}"
            )
        return _BY_NAME[data_format]
    value = object_of(record)
    both = [key for key in _TURNS if value.get(key)]
    if len(both) > 1:
        raise InputError(
            f"{record.name}: has {both}, and one of them would not be read; keep one, or leave "
            f"one out with --ignore-keys {both[-1]}"
        )
    found = next((one for one in FORMATS if one.recognises(record)), None)
    if found is None:
        keys = sorted(map(str, value)) + sorted(record.members)
        raise InputError(
            f"{record.name}: has neither 'messages' nor 'conversations' nor the keys of another "
            f"format; got the keys {str(keys)[:200]}; docs/data.md has all formats"
        )
    return found


def read_record(record: RawRecord, options: ReadingOptions) -> Conversation | Document:
    """The conversation or document that a record holds.

    Raises:
        ConfigError: as ``detect``.
        InputError: no format has these keys; as ``Format.read``.
    """
    value = object_of(record)
    if options.ignored:
        value = {key: one for key, one in value.items() if key not in options.ignored}
        members = {key: one for key, one in record.members.items() if key not in options.ignored}
        record = replace(record, value=value, members=members)
    record = replace(
        record,
        value=with_columns(value),
        media_folder=record.media_folder or options.media_folder,
    )
    return detect(record, options.data_format).read(record, options)
