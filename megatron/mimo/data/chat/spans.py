"""Places in a text: where it is learned."""

from __future__ import annotations

__all__ = ["Span", "without_thinking"]

Span = tuple[int, int]

_BEGIN, _END = "<think>", "</think>"


def without_thinking(text: str, span: Span) -> list[Span]:
    """What of a span (first, end) is left without its ``<think>`` parts and the space behind them.

    A part that was begun before the span, as templates do that ask the model to think, reaches
    from its first place; one that is not ended reaches to its end.
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
