"""Samples and statistics as one page of HTML that needs no other file."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

from megatron.mimo.inspection.seen import Piece, Seen
from megatron.mimo.inspection.statistics import Statistics, histogram
from megatron.mimo.inspection.thumbnails import Thumbnail

__all__ = ["page"]

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em; }
section { border: 1px solid #ccc; border-radius: 6px; padding: 0 1em 1em; margin: 1em 0; }
h2 { font-size: 1em; } small { color: #666; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f7f7f7; padding: .6em; }
pre span:hover { outline: 1px solid #888; }
.learned { background: #b9eeb9; } .medium { background: #cfe0ff; color: #234; }
.refused { color: #a00; } figure { display: inline-block; margin: .3em 1em .3em 0; }
figcaption { font-size: .8em; color: #666; max-width: 20em; overflow-wrap: anywhere; }
img { border: 1px solid #ddd; } rect { fill: #5a83c4; } text { font-size: 11px; fill: #333; }
"""
_WIDTH, _HEIGHT = 640, 18  # of the histogram and of each of its bars


def page(samples: Sequence[Seen], statistics: Statistics, title: str) -> str:
    """The page.

    Args:
        samples: that are shown in full.
        statistics: of all records that were read.
        title: of the page.
    """
    told = "".join(f"<li>{escape(line)}</li>" for line in statistics.lines())
    reasons = "".join(f'<li class="refused">{escape(one)}</li>' for one in statistics.reasons)
    refused = f"<h2>Refused</h2><ul>{reasons}</ul>" if reasons else ""
    shown = "".join(_section(seen) for seen in samples)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{escape(title)}</h1>"
        '<p>Text as the model reads it: <span class="learned">learned</span>, '
        '<span class="medium">rows of media</span>, context. Point at a token for its id.</p>'
        f"<ul>{told}</ul>{_histogram(statistics)}{refused}{shown}</body></html>\n"
    )


def _section(seen: Seen) -> str:
    counts = f"{seen.length} tokens, {seen.learned} learned"
    if seen.cut_turns:
        counts += f", {seen.cut_turns} turns cut away"
    head = f"<h2>{escape(seen.name)} <small>{escape(seen.format_ or 'no format')}</small></h2>"
    figures = "".join(map(_figure, seen.thumbnails))
    if seen.refusal is not None:
        reason = f"refused, {seen.refusal.kind}: {seen.refusal.reason}"
        return f'<section>{head}{figures}<p class="refused">{escape(reason)}</p></section>'
    text = "".join(map(_piece, seen.pieces))
    return f"<section>{head}<p>{counts}</p>{figures}<pre>{text}</pre></section>"


def _piece(piece: Piece) -> str:
    if piece.modality is not None:
        label = f"[{piece.modality}: {len(piece.tokens)} rows]"
        return f'<span class="medium" title="{piece.tokens[0]}">{escape(label)}</span>'
    name = ' class="learned"' if piece.is_learned else ""
    if "".join(piece.texts) != piece.text:  # characters of several tokens
        return f'<span{name} title="{" ".join(map(str, piece.tokens))}">{escape(piece.text)}</span>'
    return "".join(
        f'<span{name} title="{token}">{escape(text)}</span>'
        for token, text in zip(piece.tokens, piece.texts, strict=True)
    )


def _figure(one: Thumbnail) -> str:
    file = io.BytesIO()
    one.image.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    caption = escape(f"{one.kind} {one.name}: {one.size}")
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{caption}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _histogram(statistics: Statistics) -> str:
    bars = histogram(statistics.lengths)
    if not bars:
        return ""
    most = max(bar.count for bar in bars)
    rows = []
    for number, bar in enumerate(bars):
        top, width = number * _HEIGHT, round((_WIDTH - 220) * bar.count / most)
        rows.append(
            f'<text x="0" y="{top + 13}">{bar.low} to {bar.high - 1} tokens</text>'
            f'<rect x="150" y="{top + 2}" width="{width}" height="{_HEIGHT - 4}"/>'
            f'<text x="{156 + width}" y="{top + 13}">{bar.count}</text>'
        )
    return f'<svg width="{_WIDTH}" height="{_HEIGHT * len(bars)}">{"".join(rows)}</svg>'
