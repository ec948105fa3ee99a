"""The picture at the end of a run: what was asked, what was answered, how the loss fell."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

_RIGHT, _WRONG, _GREY = "#1a7f37", "#cf222e", "#57606a"
_CARDS_PER_ROW = 5


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

    rows: list[tuple[str, Sequence[Card]]] = []
    for heading, cards in sections:
        for start in range(0, len(cards), _CARDS_PER_ROW):
            rows.append((heading if start == 0 else "", cards[start : start + _CARDS_PER_ROW]))
    header, curve_height, card_height = 0.9, 3.0, 1.75
    heights = [header] + [card_height + (0.35 if heading else 0) for heading, _ in rows]
    figure = Figure(figsize=(13, sum(heights) + curve_height), layout="constrained")
    FigureCanvasAgg(figure)
    parts = figure.subfigures(len(heights) + 1, 1, height_ratios=[*heights, curve_height])
    parts[0].text(0.012, 0.62, title, fontsize=19, weight="bold", va="center")
    parts[0].text(0.012, 0.16, summary, fontsize=11.5, color=_GREY, va="center")
    for part, (heading, cards) in zip(parts[1:-1], rows, strict=True):
        if heading:
            part.suptitle(heading, x=0.012, ha="left", fontsize=13, weight="bold")
        cells = part.subfigures(1, _CARDS_PER_ROW, squeeze=False)[0]
        for cell, card in zip(cells, cards, strict=False):
            _draw_card(cell, card)
    _draw_loss(parts[-1], loss_curve)
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, dpi=110, format="png", facecolor="white")
    partial.replace(path)


def _draw_card(cell: Any, card: Card) -> None:
    right = card.answer == card.truth
    color = _RIGHT if right else _WRONG
    slots = 4  # a single image is not blown up to the width of the card
    columns = max(slots, len(card.images))
    grid = cell.add_gridspec(3, columns, height_ratios=[1.15, 0.5, 0.6], wspace=0.02, hspace=0.02)
    for column, image in enumerate(card.images):
        axes = cell.add_subplot(grid[0, column])
        axes.imshow(image.movedim(0, -1).squeeze(-1).numpy(), cmap="gray_r", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set_color("#d0d7de")
    if card.images:
        question = cell.add_subplot(grid[1, :])
        size, lines = 10.5, card.question
    else:
        question = cell.add_subplot(grid[0:2, :])
        size, lines = 11.5, "\n".join(textwrap.wrap(card.question, 26))
    question.text(0.02, 0.5, lines, fontsize=size, va="center", style="italic")
    answer = cell.add_subplot(grid[2, :])
    says = f"{card.answer or '(nothing)'}"
    answer.text(0.02, 0.55, f"{'✓' if right else '✗'}  {says}", fontsize=15, color=color,
                va="center", weight="bold")  # fmt: skip
    if not right:
        answer.text(0.98, 0.55, f"is {card.truth}", fontsize=12, color=_GREY, va="center",
                    ha="right")  # fmt: skip
    for axes in (question, answer):
        axes.axis("off")


def _draw_loss(part: Any, loss_curve: Sequence[tuple[int, float]]) -> None:
    part.suptitle("Training loss", x=0.012, ha="left", fontsize=13, weight="bold")
    axes = part.subplots()
    if not loss_curve:
        axes.text(0.5, 0.5, "no iteration was logged", ha="center", color=_GREY)
        axes.axis("off")
        return
    iterations, losses = zip(*loss_curve, strict=True)
    axes.plot(iterations, losses, color="#0969da", linewidth=1.3)
    if min(losses) > 0:
        axes.set_yscale("log")
    axes.set(xlabel="iteration", ylabel="loss per answer token")
    axes.grid(visible=True, which="both", color="#eaeef2")
    axes.spines[["top", "right"]].set_visible(False)
    axes.annotate(f"{losses[-1]:.3f}", (iterations[-1], losses[-1]), xytext=(4, 0),
                  textcoords="offset points", va="center", color="#0969da")  # fmt: skip
