"""From records, as files hold them, to conversations and documents.

``data/sources`` opens files (JSON Lines, parquet, tars ...) and yields a ``RawRecord`` for each
record: what stands there, and file and line for messages. ``read_record`` tells the format and
interprets it; it opens nothing. ``data/reading`` goes on from there: it decodes the media,
writes the text, and gives a ``Sample``, or a ``BadSample`` that says why there is none.

    source (file, position) -> RawRecord -> Conversation | Document -> Sample | BadSample
           data/sources        data/formats                data/reading

A source never looks into a record's value, and a format never opens a file. A record that is bad
is consumed like any other: positions count records, so that what was left out changes no order.
"""

from megatron.mimo.data.formats.detection import FORMATS, detect, read_record
from megatron.mimo.data.formats.field_map import FieldMap, field_map
from megatron.mimo.data.formats.record import Format, RawRecord, ReadingOptions
from megatron.mimo.data.formats.tar_members import tar_record

__all__ = [
    "FORMATS",
    "FieldMap",
    "Format",
    "RawRecord",
    "ReadingOptions",
    "detect",
    "field_map",
    "read_record",
    "tar_record",
]
