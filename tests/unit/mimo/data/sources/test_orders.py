from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megatron.core.models.mimo.errors import ConfigError
from megatron.mimo.data.sources import MixtureSpec, SourceSpec, read_mixture
from megatron.mimo.data.sources.mixture import Mixture
from megatron.mimo.data.sources.orders import IndexedOrder, StreamingOrder
from megatron.mimo.data.sources.permutation import Permutation, random_fraction
from tests.unit.mimo.data.sources.records import (
    mixed,
    numbered,
    two_sources,
    write_lines,
    write_parquet,
)


@pytest.mark.parametrize("size", [1, 2, 3, 10, 97, 1000, 1025])
def test_a_permutation_has_every_number_once(size: int) -> None:
    for epoch in range(3):
        order = Permutation(size, 5, epoch)
        assert sorted(order[place] for place in range(size)) == list(range(size))


def test_permutations_differ_and_look_random() -> None:
    first, second, other = ([Permutation(1000, *key)[i] for i in range(1000)]
                            for key in ((1, 0), (1, 1), (2, 0)))  # fmt: skip
    assert len({*map(tuple, (first, second, other))}) == 3
    for order in (first, second, other):
        kept = sum(place == number for place, number in enumerate(order))
        rising = sum(a < b for a, b in itertools.pairwise(order))
        assert kept < 10
        assert 440 < rising < 560
    values = [random_fraction(3, number) for number in range(10000)]
    assert abs(sum(values) / 10000 - 0.5) < 0.02
    assert max(Counter(int(value * 10) for value in values).values()) < 1150


def draw(order: Any, count: int) -> list[Any]:
    return [order.draw() for _ in range(count)]


def streaming(folder: Path, **changes: Any) -> StreamingOrder:
    from megatron.mimo.data.sources.mixture import SourceFiles

    folder.mkdir(exist_ok=True)
    paths = [write_parquet(folder / f"{n}.parquet", numbered(10 + n), group=4) for n in range(4)]
    settings = {"seed": 3, "buffer": 8} | changes
    return StreamingOrder(SourceFiles(paths, folder), **settings)


def indexed(**changes: Any) -> IndexedOrder:
    return IndexedOrder([10, 0, 11, 12, 13], **({"seed": 3, "limit": None} | changes))


@pytest.mark.parametrize("kind", ["indexed", "streaming"])
def test_every_epoch_has_every_record_once_in_another_order(kind: str, tmp_path: Path) -> None:
    order: Any = indexed() if kind == "indexed" else streaming(tmp_path)
    drawn = [draw(order, 46) for _ in range(3)]
    assert [{epoch for *_, epoch in one} for one in drawn] == [{0}, {1}, {2}]
    epochs = [[place[:2] for place in one] for one in drawn]
    assert [len(set(one)) for one in epochs] == [46, 46, 46]
    assert {tuple(sorted(one)) for one in epochs} == {tuple(sorted(epochs[0]))}
    assert len({tuple(one) for one in epochs}) == 3


@pytest.mark.parametrize("kind", ["indexed", "streaming"])
@pytest.mark.parametrize("seed", [3, None])
def test_an_order_goes_on_from_its_state(kind: str, seed: int | None, tmp_path: Path) -> None:
    def fresh() -> Any:
        return indexed(seed=seed) if kind == "indexed" else streaming(tmp_path, seed=seed)

    whole = draw(fresh(), 120)
    for stop in (0, 1, 7, 45, 46, 47, 100):
        first = fresh()
        assert draw(first, stop) == whole[:stop]
        state = json.loads(json.dumps(first.state_dict()))
        second = fresh()
        second.load_state_dict(state)
        assert draw(second, 120 - stop) == whole[stop:]


def test_without_a_seed_the_files_order_is_kept(tmp_path: Path) -> None:
    expected = [(file, record, 0) for file in range(4) for record in range(10 + file)]
    assert draw(streaming(tmp_path, seed=None), 46) == expected


def test_streaming_opens_one_file_after_the_other(tmp_path: Path) -> None:
    order = streaming(tmp_path)
    drawn = draw(order, 10)
    assert len({file for file, *_ in drawn}) <= 2  # a buffer of 8, files of at least 10
    assert len(order._files._opened) <= 2  # type: ignore[attr-defined]


def test_orders_end_where_they_are_told_to(tmp_path: Path) -> None:
    assert [place is None for place in draw(indexed(limit=3), 5)] == [False] * 3 + [True] * 2
    order = streaming(tmp_path, epochs=1)
    assert [place is None for place in draw(order, 48)] == [False] * 46 + [True] * 2
    assert draw(streaming(tmp_path, limit=2), 3)[2] is None


def shares(mixture: Mixture, step: int, count: int) -> Counter[int]:
    found = [mixture.draw(step) for _ in range(count)]
    return Counter(one.source for one in found if one is not None)


def test_weights_are_kept_and_change_at_their_step(tmp_path: Path) -> None:
    mixture = mixed(tmp_path, two_sources(tmp_path))
    before = shares(mixture, 3, 3000)
    assert abs(before[0] / 3000 - 2 / 3) < 0.03
    after = shares(mixture, 4, 3000)
    assert abs(after[0] / 3000 - 1 / 4) < 0.03


def test_a_source_that_is_used_up_leaves_its_share_to_the_others(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", numbered(10))
    write_lines(tmp_path / "b.jsonl", numbered(10))
    spec = MixtureSpec(
        sources=[
            SourceSpec(name="a", paths=[str(tmp_path / "a.jsonl")], weight=5, epochs=1.5),
            SourceSpec(name="b", paths=[str(tmp_path / "b.jsonl")], limit=4),
        ]
    )
    mixture = mixed(tmp_path, spec)
    assert shares(mixture, 1, 100) == {0: 15, 1: 4}
    assert mixture.draw(1) is None
    state = json.loads(json.dumps(mixture.state_dict()))
    again = mixed(tmp_path, spec)
    again.load_state_dict(state)
    assert again.draw(1) is None


def test_a_seed_is_an_order(tmp_path: Path) -> None:
    def drawn(seed: int | None) -> list[Any]:
        mixture = mixed(tmp_path, two_sources(tmp_path), seed=seed)
        return [mixture.draw(1) for _ in range(60)]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_a_state_of_other_data_is_refused(tmp_path: Path) -> None:
    spec = two_sources(tmp_path)
    state = mixed(tmp_path, spec).state_dict()
    other = MixtureSpec(sources=[spec.sources[0]])
    with pytest.raises(ConfigError, match=r"from \['lines', 'tars'\], .* \['lines'\].*restart"):
        mixed(tmp_path, other).load_state_dict(state)
    streamed = MixtureSpec(
        sources=[
            SourceSpec(name="lines", paths=spec.sources[0].paths, order="streaming"),
            spec.sources[1],
        ]
    )
    with pytest.raises(ConfigError, match=r"'lines' was read in indexed order"):
        mixed(tmp_path, streamed).load_state_dict(state)
    write_lines(tmp_path / "lines.jsonl", numbered(98))
    with pytest.raises(ConfigError, match=r"files of source 'lines' are not those .*restart-data"):
        mixed(tmp_path, spec).load_state_dict(state)


MIXTURE = """
sources:
  captions: {paths: [a.jsonl, b/*.tar], weight: 3, epochs: 2}
  text: c.jsonl
changes:
  - {step: 100, weights: {text: 4}}
"""


def test_a_mixture_is_read_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "mix.yaml"
    path.write_text(MIXTURE)
    spec = read_mixture(path)
    assert spec.sources[0].paths == [str(tmp_path / "a.jsonl"), str(tmp_path / "b/*.tar")]
    assert (spec.sources[0].epochs, spec.sources[1].weight) == (2, 1)
    assert [spec.weights(step) for step in (1, 99, 100, 500)] == [[3, 1]] * 2 + [[3, 4]] * 2


def test_a_record_knows_its_epoch(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", numbered(3))
    path = tmp_path / "mix.yaml"
    path.write_text("sources: {a: a.jsonl}")
    mixture = Mixture(read_mixture(path), index_folder=tmp_path / "index", seed=1, buffer=2)
    draws = [mixture.draw(1) for _ in range(7)]
    assert [mixture.read(one).epoch for one in draws if one] == [0, 0, 0, 1, 1, 1, 2]


def test_a_source_says_where_its_media_lie(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", numbered(2))
    (tmp_path / "media").mkdir()
    path = tmp_path / "mix.yaml"
    for folder, expected in (("", tmp_path), (", media_folder: media", tmp_path / "media")):
        path.write_text(f"sources: {{a: {{paths: a.jsonl{folder}}}}}")
        mixture = Mixture(read_mixture(path), index_folder=tmp_path / "index", seed=1, buffer=2)
        draw = mixture.draw(1)
        assert draw is not None
        assert mixture.read(draw).folder == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("epochs: 2", "media_folder: none"), r"media_folder .*none is no folder; correct it"),
        (("weight: 3", "wait: 3"), r"source 'captions': unknown wait; expected paths, weight"),
        (("weight: 3", "weight: -1"), r"weight is -1; expected a number of at least 0"),
        (("epochs: 2", "epochs: no"), r"epochs is False; expected more than 0"),
        (("epochs: 2", "limit: 2.5"), r"limit is 2.5; expected a number of samples"),
        (("epochs: 2", "order: any"), r"order is 'any'; expected auto, indexed or streaming"),
        (("text: c.jsonl", "text: 3"), r"source 'text': expected 'paths'.* got 3"),
        (("step: 100", "step: 0"), r"weights change at step 0; expected a step after 0"),
        (("{text: 4}", "{txt: 4}"), r"step 100 names \['txt'\]; expected some of"),
        (("{text: 4}", "{text: 0, captions: 0}"), r"at step 100 all weights are 0"),
        (("changes", "change"), r"unknown change; expected sources, changes"),
        (("sources:", "- ["), r"mix.yaml cannot be read: while parsing"),
    ],
)
def test_a_mixture_that_is_malformed_is_refused(
    change: tuple[str, str], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "mix.yaml"
    path.write_text(MIXTURE.replace(*change))
    with pytest.raises(ConfigError, match=message):
        read_mixture(path)
