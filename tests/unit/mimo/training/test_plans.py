"""Exact elastic resume: global batches do not depend on ranks, workers or micro-batches."""

from __future__ import annotations

import json
import random
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from megatron.core.models.mimo.errors import ConfigError, InputError
from megatron.mimo.data import PackingCollator, SampleCollator
from megatron.mimo.data.bad_samples import BadSample, BadSampleLog, BadSamplePolicy
from megatron.mimo.data.global_batches.forming import GlobalBatches, Item, Measures, Packing
from megatron.mimo.data.global_batches.measures import Unmeasured
from megatron.mimo.data.global_batches.planned_batches import (
    LEFT_OUT,
    PlannedBatches,
    SampleSources,
)
from megatron.mimo.data.sources import MixtureSpec, SourceSpec
from megatron.mimo.training.plans import DATA_FILE, DataPosition, RankPlan, measures_of
from megatron.mimo.training.workers import read_batches
from tests.unit.mimo.data.sources.records import (
    measure_number,
    mixed,
    number_sources,
    numbered,
    read_number,
    write_lines,
)

SEQUENCE = 64
GLOBAL = 12
STEPS = 9

Batches = list[list[tuple[str, ...]]]  # names of the samples of each sequence of each batch


def collator(*, pack: bool) -> SampleCollator:
    settings: dict[str, Any] = {"seq_length": SEQUENCE, "vocab_size": 8, "pad_id": 7}
    kind = PackingCollator if pack else SampleCollator
    return kind(**settings, special_token_ids={}, media_formats={})


class Named(PlannedBatches):
    """The names of the samples that a micro-batch is made of."""

    def __getitem__(self, items: Any) -> Any:
        return {"names": [tuple(one.name for one in self.samples(item)) for item in items]}


def rank(
    sources: SampleSources,
    args: Namespace,
    *,
    pack: bool,
    dp: tuple[int, int],
    state: Any,
    measured: bool = True,
) -> tuple[RankPlan, DataPosition]:
    packing = Packing(capacity=SEQUENCE, multiple=8, look_ahead=24) if pack else None
    measures: Measures = Unmeasured()
    if measured:
        measures = measures_of(sources.measured, workers=0, group=None, late=[])
    log = BadSampleLog(sources.policy)
    formed = GlobalBatches(sources.mixture, measures, packing=packing, left_out=log.add)
    if state is not None:
        formed.load_state_dict(state)
        log.load_state_dict(state["bad"])
    position = DataPosition(args)

    def cost(item: Item) -> float:
        return float(sum(one.measure.length**2 for one in item if one.measure is not None))

    plan = RankPlan(
        formed,
        size_at=lambda _: GLOBAL,
        start=args.consumed_train_samples,
        dp_rank=dp[0],
        dp_size=dp[1],
        micro_batch=args.micro_batch_size,
        cost=cost,
        log=log,
        position=position,
    )
    return plan, position


def run(
    folder: Path,
    first: int,
    last: int,
    state: Any,
    *,
    pack: bool,
    dp: int,
    micro: int,
    workers: int,
) -> tuple[Batches, Any]:
    """Train iterations ``first`` to ``last`` on ``dp`` ranks; what they saw, and the last state."""
    seen: Batches = [[] for _ in range(last - first)]
    states = []
    for dp_rank in range(dp):
        args = Namespace(consumed_train_samples=first * GLOBAL, micro_batch_size=micro)
        sources = number_sources(folder)
        plan, position = rank(sources, args, pack=pack, dp=(dp_rank, dp), state=state)
        batches = Named(sources, collator(pack=pack))
        stream: Iterator[Any] = read_batches(batches, plan, workers)
        for step in range(last - first):
            for batch in islice(stream, GLOBAL // (dp * micro)):
                seen[step] += batch["names"]
            args.consumed_train_samples += GLOBAL
        position.save(folder)
        states.append(json.loads((folder / DATA_FILE).read_text())["state"])
    assert all(one == states[0] for one in states)  # every rank follows the whole
    return [sorted(step) for step in seen], states[0]


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    import megatron.mimo.training.plans as plans

    monkeypatch.setattr(plans.dist, "get_rank", lambda: 0)


@pytest.mark.slow
@pytest.mark.parametrize("pack", [True, False], ids=["packed", "one by one"])
def test_random_stops_and_layouts_give_the_same_batches(pack: bool, tmp_path: Path) -> None:
    whole, _ = run(tmp_path, 0, STEPS, None, pack=pack, dp=1, micro=1, workers=0)
    assert len({name for step in whole for item in step for name in item}) > 100
    generator = random.Random(16)
    for number in range(10):
        seen: Batches = []
        state, at = None, 0
        while at < STEPS:
            stop = min(STEPS, at + generator.randint(1, 5))
            dp = generator.choice([1, 2, 3, 4, 6])
            micro = generator.choice([size for size in (1, 2, 3, 4) if GLOBAL % (dp * size) == 0])
            workers = generator.choice([0, 1, 2]) if number % 5 == 0 else 0
            part, state = run(
                tmp_path, at, stop, state, pack=pack, dp=dp, micro=micro, workers=workers
            )
            seen, at = seen + part, stop
        assert seen == whole


def test_a_bad_sample_is_consumed_and_counted_once(tmp_path: Path) -> None:
    _, state = run(tmp_path, 0, 5, None, pack=True, dp=2, micro=1, workers=0)
    assert state["bad"]["bad"] > 3
    whole, end = run(tmp_path, 0, 9, None, pack=True, dp=1, micro=1, workers=0)
    _, resumed = run(tmp_path, 5, 9, state, pack=True, dp=3, micro=2, workers=0)
    assert Counter(resumed.pop("bad")) == Counter(end.pop("bad"))
    assert resumed == end
    names = {name for step in whole for item in step for name in item}
    assert not names & {f"r{number}" for number in range(11, 100, 20)}


def test_ranks_that_measure_go_on_from_one_that_did_not(tmp_path: Path) -> None:
    lines = [one | {"bad": False} for one in numbered(200)]
    write_lines(tmp_path / "good.jsonl", lines)
    spec = MixtureSpec(sources=[SourceSpec(name="good", paths=[str(tmp_path / "good.jsonl")])])
    seen: list[list[str]] = []
    state: Any = None
    for step, (dp, size) in enumerate([(1, 12), (2, 12), (1, 16), (1, 8), (2, 8), (1, 12)]):
        sources = SampleSources(
            mixture=mixed(tmp_path, spec), read=read_number, measure=measure_number
        )
        batch = []
        for dp_rank in range(dp):
            args = Namespace(consumed_train_samples=len(seen), micro_batch_size=2)
            plan, position = rank(
                sources, args, pack=False, dp=(dp_rank, dp), state=state, measured=dp > 1
            )
            plan._size_at = lambda _, size=size: size
            for items in islice(iter(plan), size // (2 * dp)):
                batch += [sources.mixture.read(item[0].draw).value["name"] for item in items]
            if dp_rank + 1 < dp:
                sources = SampleSources(
                    mixture=mixed(tmp_path, spec), read=read_number, measure=measure_number
                )
        args.consumed_train_samples += size
        position.save(tmp_path)
        state = json.loads((tmp_path / DATA_FILE).read_text())["state"]
        assert len(set(batch)) == size, step
        seen.append(sorted(batch))
    whole = mixed(tmp_path, spec)
    drawn = []
    while len(drawn) < 68:
        draw = whole.draw(1)
        assert draw is not None
        drawn.append(whole.read(draw).value["name"])
    at = 0
    for batch in seen:
        assert batch == sorted(drawn[at : at + len(batch)])
        at += len(batch)


class Late:
    """Reads some records as bad that their measures said nothing of."""

    def __init__(self, sources: SampleSources) -> None:
        self._read = sources.read

    def __call__(self, record: Any) -> Any:
        if record.value["name"].endswith("3"):
            return BadSample(file="f", place="p", medium=None, kind="bad", reason="late")
        return self._read(record)


def test_a_sample_that_is_found_bad_late_leaves_its_place_empty(tmp_path: Path) -> None:
    sources = number_sources(tmp_path)
    late = SampleSources(
        mixture=sources.mixture, read=Late(sources), measure=sources.measure, policy=sources.policy
    )
    args = Namespace(consumed_train_samples=0, micro_batch_size=1)
    plan, _ = rank(late, args, pack=True, dp=(0, 1), state=None)
    batches, found = PlannedBatches(late, collator(pack=True)), []
    for item in islice(iter(plan), 12):
        batch = batches[item]
        names = [late.mixture.read(one.draw).value["name"] for one in item[0]]
        lost = [name for name in names if name.endswith("3")]
        kept = [name for name in names if not name.endswith("3")]
        found += batch.get(LEFT_OUT, [])
        assert len(batch.get(LEFT_OUT, [])) == len(lost)
        assert len(batch["packing_kwargs"]["cu_seqlens_q"]) - 1 - len(kept) in (0, 1)
        tokens = sum(one.measure.length for one in item[0]) - sum(
            one.measure.length
            for one in item[0]
            if late.mixture.read(one.draw).value["name"] in lost
        )
        assert int((batch["input_ids"] == 1).sum()) == tokens
    assert found


def test_a_sequence_of_which_nothing_is_left_has_no_labels(tmp_path: Path) -> None:
    sources = number_sources(tmp_path)
    nothing = SampleSources(
        mixture=sources.mixture,
        read=lambda _: BadSample(file="f", place="p", medium=None, kind="bad", reason="late"),
        measure=sources.measure,
        policy=sources.policy,
    )
    args = Namespace(consumed_train_samples=0, micro_batch_size=3)
    for pack, micro in ((True, 1), (False, 3)):
        args.micro_batch_size = micro
        plan, _ = rank(nothing, args, pack=pack, dp=(0, 1), state=None)
        batch = PlannedBatches(nothing, collator(pack=pack))[next(iter(plan))]
        assert batch["loss_mask"].sum() == 0
        assert batch["source_ids"].unique().tolist() == [2]


@pytest.mark.parametrize("micro", [1, 2])
def test_sources_of_positions_are_those_of_their_samples(tmp_path: Path, micro: int) -> None:
    sources = number_sources(tmp_path)
    args = Namespace(consumed_train_samples=0, micro_batch_size=micro)
    plan, _ = rank(sources, args, pack=True, dp=(0, 1), state=None)
    batches = PlannedBatches(sources, collator(pack=True))
    for item in islice(iter(plan), 5):
        batch = batches[item]
        assert batch["source_names"] == ["lines", "tars"]
        borders = batch["packing_kwargs"].get("cu_seqlens_q_padded")
        borders = borders or batch["packing_kwargs"]["cu_seqlens_q"]
        assert batch["source_ids"].shape == (1, micro * SEQUENCE)
        for number, sequence in enumerate(item):
            starts = [one for one in borders if one // SEQUENCE == number]
            for start, planned in zip(starts, sequence, strict=False):
                length = planned.measure.length
                ids = batch["source_ids"][0, start : start + length]
                assert ids.tolist() == [planned.draw.source] * length


def test_a_length_that_is_not_the_measured_one_is_an_error(tmp_path: Path) -> None:
    from megatron.mimo.data.measure import Measure

    sources = number_sources(tmp_path)
    wrong = SampleSources(mixture=sources.mixture, read=sources.read, measure=lambda _: Measure(40))
    args = Namespace(consumed_train_samples=0, micro_batch_size=1)
    plan, _ = rank(wrong, args, pack=False, dp=(0, 1), state=None)
    with pytest.raises(InputError, match=r"tokens, and it was measured as 40; .*--measure-by-r"):
        PlannedBatches(wrong, collator(pack=False))[next(iter(plan))]


def test_data_that_end_are_an_error_once_all_is_trained_on(tmp_path: Path) -> None:
    number_sources(tmp_path)
    one = SourceSpec(name="lines", paths=[str(tmp_path / "lines.jsonl")], limit=30)
    sources = SampleSources(
        mixture=mixed(tmp_path, MixtureSpec(sources=[one])),
        read=read_number,
        measure=measure_number,
        policy=BadSamplePolicy(on_bad_sample="skip"),
    )
    args = Namespace(consumed_train_samples=0, micro_batch_size=4)
    plan, _ = rank(sources, args, pack=False, dp=(0, 1), state=None)
    assert len(list(plan)) == 2 * 3  # two batches of 12 in micro-batches of 4
    with pytest.raises(InputError, match=r"the data end within iteration 3: all sources"):
        raise plan.failure or AssertionError


def test_a_checkpoint_without_a_position_is_refused(tmp_path: Path) -> None:
    args = Namespace(consumed_train_samples=24, restart_data=False, load=str(tmp_path), iteration=2)
    with pytest.raises(ConfigError, match=r"does not say where its data stand .*--restart-data"):
        DataPosition(args).load()
    folder = tmp_path / "iter_0000002"
    folder.mkdir()
    (folder / DATA_FILE).write_text('{"version": 1')
    with pytest.raises(ConfigError, match=r"data.json is damaged: .*--restart-data"):
        DataPosition(args).load()
    args.restart_data = True
    assert DataPosition(args).load() is None
    args = Namespace(consumed_train_samples=0, restart_data=False)
    assert DataPosition(args).load() is None
