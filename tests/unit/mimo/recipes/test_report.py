from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron.mimo.data import decode_image
from megatron.mimo.recipes.report import Card, save_report

COLOR, GREY = torch.rand(3, 6, 9), torch.rand(1, 8, 8, dtype=torch.float64).bfloat16()
CARDS = [
    Card(images=[COLOR, GREY], question="what is this?", truth="a", answer="a"),
    Card(images=[], question="in words: " + "one two three " * 3, truth="123", answer=""),
    Card(images=[GREY] * 9, question="count", truth="9", answer="9" * 50),
]


@pytest.mark.parametrize(
    "curve", [[], [(1, 2.0)], [(1, 2.0), (2, 0.0)], [(1, 30.0), (5, 0.01)]], ids=str
)
@pytest.mark.slow
def test_any_cards_and_any_curve_give_one_image(
    tmp_path: Path, curve: list[tuple[int, float]]
) -> None:
    path = tmp_path / "report.png"
    path.write_bytes(b"an older report")
    save_report(
        path, title="t", summary="s", sections=[("some", CARDS), ("none", [])], loss_curve=curve
    )
    assert decode_image(path).std() > 0.02  # something is drawn
    assert list(tmp_path.iterdir()) == [path]


def test_right_is_green_and_wrong_is_red(tmp_path: Path) -> None:
    reds = []
    for answer in ("7", "1"):
        card = Card(images=[GREY], question="what?", truth="7", answer=answer)
        path = tmp_path / f"{answer}.png"
        save_report(path, title="", summary="", sections=[("", [card])], loss_curve=[])
        red, green, _ = decode_image(path)
        reds.append(int((red > green + 0.3).sum()))
    assert reds[0] == 0
    assert reds[1] > 20
