"""Calls of tools as chat templates take them, from the spellings of several formats."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.data.formats.keys import short

__all__ = ["as_calls", "calls_of_text"]


def as_calls(calls: Any, name: str) -> list[Any]:
    """``tool_calls`` of a message, with arguments that are JSON text (OpenAI's) decoded, because
    templates encode arguments themselves.

    Raises:
        InputError: no list of calls.
    """
    if not isinstance(calls, list):
        raise InputError(f"{name}: 'tool_calls' is {short(calls)}; expected a list of calls")
    return [_call(call, name) for call in calls]


def calls_of_text(text: str, name: str) -> list[Any]:
    """A call, or a list of calls, as JSON text: ``{"name": ..., "arguments": {...}}``.

    Raises:
        InputError: it is neither.
    """
    try:
        given = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{name}: a call of a tool is not valid JSON: {error}; expected "
            '{"name": ..., "arguments": {...}}'
        ) from error
    calls = given if isinstance(given, list) else [given]
    for call in calls:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise InputError(
                f"{name}: a call of a tool is {short(call)}; expected "
                '{"name": ..., "arguments": {...}}'
            )
    return [_call({"type": "function", "function": call}, name) for call in calls]


def _call(call: Any, name: str) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        return call
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        return call
    try:
        read = json.loads(arguments or "{}")
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{name}: the arguments of {short(function.get('name'))} are text that is not JSON: "
            f"{error}; repair them"
        ) from error
    return {**call, "function": {**function, "arguments": read}}
