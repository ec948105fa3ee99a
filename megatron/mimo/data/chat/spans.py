"""Spans of a text that are learned, and how thinking is cut out of them."""

from __future__ import annotations

__all__ = ["Span", "without_thinking"]

Span = tuple[int, int]

_BEGIN, _END = "<think>", "</think>"


def without_thinking(text: str, span: Span) -> list[Span]:
    """The pieces of a span (first, end) without its ``<think>`` parts and the space behind them.

    A part may begin before the span, with templates that open ``<think>`` themselves: then it is
    cut from the start of the span. A part without an end is cut to the end of the span.
    """
    at, stop = span
    left = []
    while at < stop:
        begin, end = text.find(_BEGIN, at, stop), text.find(_END, at, stop)
        if begin < 0 and end < 0:
            left.append((at, stop))
            break
        if begin > at and (end < 0 or begin < end):
            left.append((at, begin))
        if end < 0:
            break
        end += len(_END)
        at = end + len(text[end:stop]) - len(text[end:stop].lstrip())
    return left
