from __future__ import annotations

import pytest

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.checkpoints.match import check_shapes, check_spellings, match_names
from megatron.mimo.models.common.keys import Concatenated, KeyEntry, KeyTable

TABLE = KeyTable(
    entries=(
        KeyEntry(mimo="embedding", hf=("embed.weight",)),
        KeyEntry(
            mimo="layers.{i}.fc1",
            hf=("layers.{i}.gate", "layers.{i}.up"),
            transform=Concatenated(2),
            layers=range(2),
        ),
    ),
    carried=("tower.last.*",),
    aliases=(("old.", ""),),
    tied=(("head.weight", "embed.weight"),),
)
NAMES = ["embed.weight", *(f"layers.{i}.{part}" for i in (0, 1) for part in ("gate", "up"))]


def test_sorts_names_of_any_spelling() -> None:
    match = match_names(
        ["head.weight", "tower.last.bias", *(f"old.{name}" for name in NAMES)],
        TABLE,
        source="it",
    )
    assert match.given == {name: f"old.{name}" for name in NAMES}
    assert match.carried == ("tower.last.bias",)
    assert match.copies == {"head.weight": "embed.weight"}


def test_takes_a_tied_weight_under_its_other_name() -> None:
    match = match_names(["head.weight", *NAMES[1:]], TABLE, source="it")
    assert match.given["embed.weight"] == "head.weight"
    assert not match.copies


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (NAMES[:-2], ["2 weights are missing: layers.1.gate, layers.1.up"]),
        ([*NAMES, "what"], ["1 are not known: what"]),
        ([*NAMES[:-1], "layers.1.upp"], ["is 'layers.1.upp' meant to be 'layers.1.up'?"]),
        ([*NAMES, "old.embed.weight"], ["under two names", "'old.embed.weight'"]),
    ],
)
def test_names_what_is_wrong(names: list[str], words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        match_names(names, TABLE, source="the model")
    assert all(word in str(caught.value) for word in ["the model", *words])


def test_shows_a_few_of_many() -> None:
    with pytest.raises(InputError, match="7 are not known: x0, x1, x2, x3, x4, and 2 more"):
        match_names([*NAMES, *(f"x{i}" for i in range(7))], TABLE, source="it")


def test_compares_shapes() -> None:
    check_shapes({"a": (2, 3)}, {"a": (2, 3)}, source="it")
    with pytest.raises(InputError, match=r"a is \[3, 2\], expected \[2, 3\]"):
        check_shapes({"a": (2, 3)}, {"a": (3, 2)}, source="it")


def test_the_module_tree_has_to_be_known_too() -> None:
    check_spellings(
        dict.fromkeys(["old.embed.weight", "head.weight", "tower.last.bias"], ()), TABLE
    )
    with pytest.raises(InputError, match=r"1 parameters .*: model.embed.weight; add .* aliases"):
        check_spellings(dict.fromkeys(["embed.weight", "model.embed.weight"], ()), TABLE)
