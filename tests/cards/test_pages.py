"""Pages of ``docs/models`` are what the generator writes; and a few proofs of one family."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron.mimo.models import family_names
from tests.cards.configurations import DRAWN, described, draw
from tests.cards.page import configuration_rows, page, proof_titles, verdicts_of
from tests.cards.proofs import PROOFS, Verdict, prove
from tests.rank_pool import RankPool

FOLDER = Path(__file__).parents[2] / "docs/models"
PAGES = {path.stem: path.read_text() for path in FOLDER.glob("*.md")}


def skeleton(text: str) -> list[str]:
    """A page without what a run found: numbers, dates, versions, and the rows of sizes."""
    kept = []
    for line in text.splitlines():
        if line.startswith("| `"):
            continue
        beginning = next((one for one in proof_titles() if line.startswith(one)), None)
        kept.append(beginning or re.sub(r"\*\*.*", "", line))
    return kept


@pytest.mark.parametrize("name", PAGES)
def test_a_page_has_the_form_that_the_generator_writes(name: str) -> None:
    assert name in family_names()
    text = PAGES[name]
    assert skeleton(text) == skeleton(page(name, verdicts_of(text), []))
    assert all(row in text.splitlines() for row in configuration_rows(name))
    assert re.search(r"\*\*\d+ proofs passed, 0 failed\*\* on 20\d\d-", text)


@pytest.mark.parametrize("name", family_names())
def test_configurations_differ_from_each_other(name: str) -> None:
    told = [described(draw(name, number)) for number in range(DRAWN + 1)]
    assert len(set(told)) == DRAWN + 1
    assert told == [described(draw(name, number)) for number in range(DRAWN + 1)]


def test_some_proofs_of_a_drawn_configuration(ranks: RankPool) -> None:
    verdicts = list(prove(ranks, "llava", 2, ["one process", "packed"]))
    assert [one.failure for one in verdicts] == [""] * 2
    assert all(one.deviation is not None for one in verdicts)


def test_a_page_is_read_back_and_added_to() -> None:
    titles = list(PROOFS)
    verdicts = [
        Verdict(
            number=number,
            proof=title,
            deviation=None if title == "export" else 1e-6 * (number + 1),
            refused="no experts" if title == "EP 2" else "",
            seconds=1.0,
            when="" if title in titles[:2] else "1999-12-31: torch 1.0, Python 3, CPU, 1 cores",
        )
        for title in titles
        for number in range(DRAWN + 1)
    ]
    text = page("llava", verdicts, [])
    assert f"10 s, of later proofs: {titles[0]}; {titles[1]}." in text
    assert page("llava", verdicts_of(text), []) == text
    with pytest.raises(ValueError, match="leave --add out"):
        verdicts_of("a page")


def test_a_proof_can_fail(ranks: RankPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.cards.proofs.LOGITS", 1e-12)
    (verdict,) = prove(ranks, "llava", 1, ["one process"])
    assert verdict.failure.startswith("logits off by ")
