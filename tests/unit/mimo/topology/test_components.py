"""Components from flags, what does not fit, and the drawing."""

from __future__ import annotations

import pytest

from megatron.core.models.mimo.errors import ConfigError, UnsupportedError
from megatron.mimo.topology import Component, check_components, draw, parse_component


def test_a_flag_is_a_component() -> None:
    assert parse_component("images=tp=1,dp=8") == Component(name="images", dp=8)
    language = parse_component("language=tp=2,pp=2,cp=2,rank_offset=8")
    assert language == Component(name="language", tp=2, cp=2, pp=2, rank_offset=8)
    assert language.size == 8
    assert [*language.ranks] == [*range(8, 16)]
    assert str(language) == "language=tp=2,cp=2,pp=2"


MALFORMED = {
    "images": "expected NAME=AXIS=SIZE",
    "images=tp2": "'tp2' is none of tp, cp, dp, pp, rank_offset; did you mean tp?",
    "images=tp=two": "tp is 'two'; expected an integer",
    "images=tp=1,tp=2": "tp is given twice",
    "images=tp=0": "tp is 0; expected an integer of at least 1",
    "images=rank_offset=-1": "rank_offset is -1; expected an integer of at least 0",
}


@pytest.mark.parametrize("text", MALFORMED)
def test_what_is_no_component_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_component(text)
    assert MALFORMED[text] in str(error.value)


def check(*texts: str, world: int = 4) -> list[str]:
    found = check_components(
        [parse_component(text) for text in texts], world_size=world, modalities=["images"]
    )
    return [*found]


def test_components_that_fit() -> None:
    assert check("language=tp=2,pp=2", "images=tp=4") == ["images", "language"]
    assert check("images=tp=3", "language=dp=3", world=3) == ["images", "language"]
    assert check("images=dp=2", "language=pp=2,rank_offset=2") == ["images", "language"]
    assert check("images=pp=2", "language=dp=2,rank_offset=2") == ["images", "language"]
    assert check("images=tp=3,rank_offset=1", "language=pp=1") == ["images", "language"]


UNFIT = {
    ("images=dp=4",): "not for 'language'",
    ("images=dp=4", "images=dp=4", "language=pp=4"): "--component images is given twice",
    ("image=dp=4", "language=pp=4"): "did you mean images?",
    ("language=pp=4",): "not for ['images']",
    ("images=dp=8", "language=pp=8"): "take the processes 0 to 7 (images=dp=8 on ranks 0 to 7",
    ("images=dp=2", "language=pp=1,rank_offset=3"): "take the processes 0 to 1, 3 to 3",
}


@pytest.mark.parametrize("texts", UNFIT, ids=" ".join)
def test_components_that_do_not_fit(texts: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as error:
        check(*texts)
    assert UNFIT[texts] in str(error.value)


UNSUPPORTED = {
    ("images=dp=2", "language=pp=4"): "of 'language' share 2; give all modules the same ranks",
    ("images=dp=2", "language=pp=3,rank_offset=1"): "of 'language' share 1",
    ("images=pp=4", "language=pp=4"): "leave pp away, or give them ranks of their own",
    ("images=cp=4", "language=pp=4"): "leave cp away",
}


@pytest.mark.parametrize("texts", UNSUPPORTED, ids=" ".join)
def test_what_no_layout_runs(texts: tuple[str, ...]) -> None:
    with pytest.raises(UnsupportedError) as error:
        check(*texts)
    assert UNSUPPORTED[texts] in str(error.value)


def test_the_drawing_names_every_rank() -> None:
    components = check_components(
        [parse_component("images=tp=1,dp=4"), parse_component("language=tp=2,pp=2")],
        world_size=4,
    )
    assert draw(components).splitlines() == [
        "images: tp 1 x cp 1 x dp 4 x pp 1 on ranks 0 to 3 (encoders and projection)",
        "language: tp 2 x cp 1 x dp 1 x pp 2 on ranks 0 to 3 (the language model)",
        "",
        "rank      0        1        2        3",
        "images    dp0      dp1      dp2      dp3",
        "language  tp0 pp0  tp1 pp0  tp0 pp1  tp1 pp1",
    ]
