"""Which format a record has."""

from __future__ import annotations

from megatron.core.models.mimo.errors import ConfigError
from megatron.mimo.data.conversation import Conversation, Document
from megatron.mimo.data.conversation_formats import parse
from megatron.mimo.data.formats.record import RawRecord, ReadingOptions

__all__ = ["detect", "read_record"]


def detect(record: RawRecord, data_format: str | None = None) -> str:
    """Name of the format that a record has.

    Raises:
        ConfigError: there is no such format.
    """
    if data_format not in (None, "messages", "llava"):
        raise ConfigError(f"--data-format {data_format}: expected messages or llava")
    return data_format or ("llava" if "conversations" in record.value else "messages")


def read_record(record: RawRecord, options: ReadingOptions) -> Conversation | Document:
    """The conversation or document that a record holds.

    Raises:
        InputError: as ``Format.read``; no format is recognised.
    """
    return parse(record.value, record.name, record.folder, ignored=options.ignored)
