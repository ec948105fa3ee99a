"""The picture at the end of a run: what was asked, what was answered, how the loss fell."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

_BLUE, _GREY, _LINE = "#0969da", "#57606a", "#d0d7de"
_RIGHT = ("#1a7f37", "#f2fbf4")  # ink and paper
_WRONG = ("#cf222e", "#fff5f4")

# The page, in inches from its top left corner.
_WIDTH, _MARGIN, _GAP = 13.0, 0.35, 0.16
_CARDS_PER_ROW, _CARD_HEIGHT, _IMAGE = 5, 1.42, 0.5
_CARD_WIDTH = (_WIDTH - 2 * _MARGIN - (_CARDS_PER_ROW - 1) * _GAP) / _CARDS_PER_ROW
_TITLE_HEIGHT, _HEADING_HEIGHT, _CURVE_HEIGHT = 1.15, 0.45, 2.6


@dataclass(frozen=True, kw_only=True)
class Card:
    """One question and its answer.

    Attributes:
        images: float [C, H, W] in 0..1 each, C = 1 or 3; none for a question in words.
        question: what the model read, besides the images.
        truth: the right answer.
        answer: the model's.
    """

    images: Sequence[Tensor]
    question: str
    truth: str
    answer: str


def save_report(
    path: Path,
    *,
    title: str,
    summary: str,
    sections: Sequence[tuple[str, Sequence[Card]]],
    loss_curve: Sequence[tuple[int, float]],
) -> None:
    """Write a PNG of titled rows of cards above the loss curve.

    Args:
        path: the file to write; it is replaced in one step.
        title: headline.
        summary: one line under it.
        sections: (heading, cards); a section without cards is left out.
        loss_curve: (iteration, loss) pairs; may be empty.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sections = [(heading, cards) for heading, cards in sections if cards]
    rows = sum(-(-len(cards) // _CARDS_PER_ROW) for _, cards in sections)
    height = (
        _TITLE_HEIGHT
        + len(sections) * _HEADING_HEIGHT
        + rows * (_CARD_HEIGHT + _GAP)
        + _HEADING_HEIGHT
        + _CURVE_HEIGHT
    )
    figure = Figure(figsize=(_WIDTH, height))
    FigureCanvasAgg(figure)
    _write(figure, _MARGIN, 0.48, title, fontsize=20, weight="bold")
    _write(figure, _MARGIN, 0.86, summary, fontsize=12, color=_GREY)
    top = _TITLE_HEIGHT
    for heading, cards in sections:
        _write(figure, _MARGIN, top + 0.22, heading, fontsize=13.5, weight="bold")
        top += _HEADING_HEIGHT
        for place, card in enumerate(cards):
            row, column = divmod(place, _CARDS_PER_ROW)
            left = _MARGIN + column * (_CARD_WIDTH + _GAP)
            _draw_card(figure, left, top + row * (_CARD_HEIGHT + _GAP), card)
        top += -(-len(cards) // _CARDS_PER_ROW) * (_CARD_HEIGHT + _GAP)
    _write(figure, _MARGIN, top + 0.22, "Training loss", fontsize=13.5, weight="bold")
    _draw_loss(figure, top + _HEADING_HEIGHT, loss_curve)
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, dpi=110, format="png", facecolor="white")
    partial.replace(path)


def _box(figure: Any, left: float, top: float, width: float, height: float) -> Any:
    """Axes in a rectangle of the page."""
    page_width, page_height = figure.get_size_inches()
    return figure.add_axes(
        (
            left / page_width,
            1 - (top + height) / page_height,
            width / page_width,
            height / page_height,
        )
    )


def _write(figure: Any, left: float, middle: float, text: str, **style: Any) -> None:
    page_width, page_height = figure.get_size_inches()
    figure.text(left / page_width, 1 - middle / page_height, text, va="center", **style)


def _draw_card(figure: Any, left: float, top: float, card: Card) -> None:
    right = card.answer == card.truth
    ink, paper = _RIGHT if right else _WRONG
    panel = _box(figure, left, top, _CARD_WIDTH, _CARD_HEIGHT)
    panel.set(xticks=[], yticks=[], facecolor=paper)
    panel.spines[:].set_color(_LINE)
    inner = left + 0.1
    size = min(_IMAGE, (_CARD_WIDTH - 0.2) / max(len(card.images), 1) - 0.05)
    for number, image in enumerate(card.images):
        axes = _box(figure, inner + number * (size + 0.05), top + 0.1, size, size)
        axes.imshow(image.float().movedim(0, -1).squeeze(-1).numpy(), cmap="gray_r", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_color(_LINE)
    question = "\n".join(textwrap.wrap(card.question, 31))
    middle = top + (0.82 if card.images else 0.48)
    _write(figure, inner, middle, question, fontsize=10.5, style="italic", color="#24292f")
    answer = card.answer if len(card.answer) <= 9 else f"{card.answer[:8]}…"
    verdict = f"{'✓' if right else '✗'}  {answer or '(nothing)'}"
    _write(figure, inner, top + 1.15, verdict, fontsize=16, weight="bold", color=ink)
    if not right:
        truth = f"truth: {card.truth}"
        end = left + _CARD_WIDTH - 0.1
        _write(figure, end, top + 1.15, truth, fontsize=11.5, color=_GREY, ha="right")


def _draw_loss(figure: Any, top: float, loss_curve: Sequence[tuple[int, float]]) -> None:
    left = _MARGIN + 0.6
    axes = _box(figure, left, top, _WIDTH - left - _MARGIN - 0.4, _CURVE_HEIGHT - 0.65)
    axes.spines[["top", "right"]].set_visible(False)
    if not loss_curve:
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "no iteration was logged", ha="center", color=_GREY)
        return
    iterations, losses = zip(*loss_curve, strict=True)
    axes.plot(iterations, losses, color=_BLUE, linewidth=1.3)
    if min(losses) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}" if max(losses) < 10 * min(losses) else "")
    axes.set(xlabel="iteration", ylabel="loss per answer token")
    axes.grid(visible=True, which="both", color="#eaeef2")
    axes.annotate(
        f"{losses[-1]:.2g}",
        (iterations[-1], losses[-1]),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        color=_BLUE,
    )
