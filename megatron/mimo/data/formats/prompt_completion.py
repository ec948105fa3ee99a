"""``prompt`` and ``completion``: texts, or lists of messages of which the completion is learned.

{"prompt": "What is this?", "completion": "A cat.", "images": ["a.png"]}
{"prompt": "What is this?", "response": "A cat."}
{"prompt": [{"role": "user", "content": "..."}], "completion": [{"role": "assistant", ...}]}
"""

from __future__ import annotations

from dataclasses import replace

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.data.conversation import Conversation
from megatron.mimo.data.formats.conversing import conversation, object_of, turn_list
from megatron.mimo.data.formats.keys import known_keys
from megatron.mimo.data.formats.marked_messages import COLUMNS, marked_turns
from megatron.mimo.data.formats.questions import one_of, question_turns, text_of
from megatron.mimo.data.formats.record import Format, RawRecord, ReadingOptions
from megatron.mimo.data.formats.record_media import RecordMedia

__all__ = ["PROMPT_COMPLETION"]


_COMPLETIONS = ("completion", "response")


def _recognises(record: RawRecord) -> bool:
    return "prompt" in record.value and any(key in record.value for key in _COMPLETIONS)


def _read(record: RawRecord, options: ReadingOptions) -> Conversation:
    name = record.name
    read = {"prompt", *_COMPLETIONS, "system", "tools", *COLUMNS}
    given = known_keys(object_of(record), read, name, options.ignored)
    media = RecordMedia(record, COLUMNS)
    key = one_of(_COMPLETIONS, given, name)
    prompt, completion = given.get("prompt"), given.get(key)
    if isinstance(prompt, list) != isinstance(completion, list):
        raise InputError(
            f"{name}: 'prompt' is {type(prompt).__name__} and {key!r} "
            f"{type(completion).__name__}; expected two texts or two lists of messages"
        )
    if not isinstance(prompt, list):
        pair = text_of(given, "prompt", name), text_of(given, key, name)
        return conversation(record, given, question_turns([pair], media, name), media, options)
    asked = turn_list(prompt, "prompt", name)
    turns = marked_turns([*asked, *turn_list(completion, key, name)], record, media, options)
    turns[: len(asked)] = [replace(turn, is_learned=False) for turn in turns[: len(asked)]]
    return conversation(record, given, turns, media, options)


PROMPT_COMPLETION = Format(
    name="prompt-completion",
    summary="prompt and completion, texts or messages (+ images)",
    recognises=_recognises,
    read=_read,
)
