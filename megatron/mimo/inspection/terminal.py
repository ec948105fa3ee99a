"""Samples and statistics as text, coloured where a terminal shows colours."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from megatron.mimo.inspection.seen import Piece, Seen
from megatron.mimo.inspection.statistics import Statistics, histogram

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["sample_text", "statistics_text"]

_GREEN, _DIM, _RED, _BOLD, _OFF = "\x1b[30;42m", "\x1b[2m", "\x1b[31m", "\x1b[1m", "\x1b[0m"
_BAR = 40


def sample_text(seen: Seen, *, colour: bool, tokens: bool = False) -> str:
    """A sample: its name, its media, its text, in which «» or green stands around what is learned.

    Args:
        seen: the sample.
        colour: with ANSI sequences.
        tokens: with a list of all tokens.
    """

    def dyed(text: str, code: str) -> str:
        return f"{code}{text}{_OFF}" if colour else text

    counts = f"{seen.length} tokens, {seen.learned} learned" if seen.pieces else "no sample"
    if seen.cut_turns:
        counts += f", {seen.cut_turns} turns cut away"
    lines = [dyed(f"{seen.name} ({seen.format_ or 'no format'}): {counts}", _BOLD)]
    for one in seen.thumbnails:
        lines.append(dyed(f"{one.kind} {_plain(one.name)}: {one.size}", _DIM))
        if colour:
            lines += _blocks(one.image)
    if seen.refusal is not None:
        lines.append(dyed(f"refused, {seen.refusal.kind}: {_plain(seen.refusal.reason)}", _RED))
    text = ""
    for piece in seen.pieces:
        if piece.modality is not None:
            text += dyed(f"[{piece.modality}: {len(piece.tokens)} rows]", _DIM)
        elif piece.is_learned:
            text += dyed(_plain(piece.text), _GREEN) if colour else f"«{_plain(piece.text)}»"
        else:
            text += _plain(piece.text)
    lines += [text] if text else []
    if tokens:
        lines += [line for piece in seen.pieces for line in _token_lines(piece)]
    return "\n".join(lines)


def statistics_text(statistics: Statistics) -> str:
    """Statistics with a histogram of lengths."""
    lines = statistics.lines()
    bars = histogram(statistics.lengths)
    most = max((bar.count for bar in bars), default=1)
    wide = max((len(str(bar.high - 1)) for bar in bars), default=1)
    for bar in bars:
        length = round(_BAR * bar.count / most)
        label = f"{bar.low:>{wide}} to {bar.high - 1:>{wide}}"
        lines.append(
            f"  {label} {'█' * length}{'▏' if bar.count and not length else ''} {bar.count}"
        )
    lines += [f"  {_plain(reason)}" for reason in statistics.reasons]
    return "\n".join(lines)


def _token_lines(piece: Piece) -> list[str]:
    if piece.modality is not None:
        return [f"  {piece.tokens[0]:>7}   {len(piece.tokens)} times, {piece.modality}"]
    mark = "*" if piece.is_learned else " "
    return [
        f"  {token:>7} {mark} {text!r}"
        for token, text in zip(piece.tokens, piece.texts, strict=True)
    ]


def _plain(text: str) -> str:
    """Text of strangers without what a terminal would obey."""
    return "".join(one if one.isprintable() or one in "\n\t" else repr(one)[1:-1] for one in text)


def _blocks(image: Image) -> list[str]:
    """A picture of at most 24 columns; each character shows two pixels, one above the other."""
    small = image.copy()
    small.thumbnail((24, 24))
    pixels_HWC = np.asarray(small)
    if len(pixels_HWC) % 2:
        pixels_HWC = np.concatenate([pixels_HWC, pixels_HWC[-1:]])
    lines = []
    for upper, lower in zip(pixels_HWC[::2], pixels_HWC[1::2], strict=True):
        cells = (
            f"\x1b[38;2;{a[0]};{a[1]};{a[2]};48;2;{b[0]};{b[1]};{b[2]}m▀"
            for a, b in zip(upper.tolist(), lower.tolist(), strict=True)
        )
        lines.append("".join(cells) + _OFF)
    return lines
