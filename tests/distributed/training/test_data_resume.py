"""Runs over records in files: stopped, and gone on with in another layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megatron.mimo.data.global_batches.measures import MeasuresHere, SharedMeasures
from megatron.mimo.data.measure import Measure
from megatron.mimo.data.sources import Draw
from megatron.mimo.training.plans import host_group
from tests.distributed.training.launch import SCRIPT, losses
from tests.rank_pool import RankPool
from tests.time_limits import HANG

TP2 = ("--tensor-model-parallel-size", "2")
PP2 = ("--pipeline-model-parallel-size", "2")
CP2 = ("--context-parallel-size", "2")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    for number in range(12):
        size = (*generator.integers(16, 41, 2), 3)
        pixels = generator.integers(0, 255, size, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    for name, count in (("a", 60), ("b", 40)):
        lines = [json.dumps(_record(generator)) for _ in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    (folder / "mix.yaml").write_text(
        "sources:\n"
        "  a: {paths: a.jsonl, weight: 2}\n"
        "  b: {paths: b.jsonl, order: streaming}\n"
        "changes:\n"
        "  - {step: 3, weights: {a: 1, b: 3}}\n"
    )
    return folder


def _record(generator: np.random.Generator) -> dict[str, Any]:
    images = [
        {"type": "image", "path": f"{generator.integers(12)}.png"}
        for _ in range(generator.integers(0, 3))
    ]
    asked = [*images, {"type": "text", "text": "What digits?" + "1" * generator.integers(0, 9)}]
    answer = "".join(map(str, generator.integers(0, 9, generator.integers(1, 6))))
    return {
        "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    }


def run(ranks: RankPool, data: Path, output: Path, world: int, last: int, *flags: str) -> list[str]:
    """Train to iteration ``last``; the losses so far."""
    argv = [
        *(SCRIPT, "--recipe", "llava_tiny", "--data-mixture", data / "mix.yaml"),
        *("--index-folder", data / "index", "--output", output, "--log-interval", "1"),
        *("--global-batch-size", "8", "--save-interval", "100", "--lr-decay-style", "constant"),
        *("--train-iters", str(last), "--seq-length", "96", *flags),
    ]
    exits = ranks.start_script(world, argv, timeout=HANG).wait()
    assert [one.exit_code for one in exits] == [0] * world, "\n".join(
        one.stdout + one.stderr for one in exits
    )
    if last == 6:
        assert "iteration 6  loss by source: " in exits[0].stdout
    return list(losses(output).values())


@pytest.mark.wide
@pytest.mark.parametrize("pack", [True, False], ids=["packed", "one by one"])
def test_another_layout_goes_on_with_the_same_batches(
    pack: bool, data: Path, ranks: RankPool, tmp_path: Path
) -> None:
    packed = ("--pack", "--micro-batch-size", "1") if pack else ("--micro-batch-size", "2")
    whole = run(ranks, data, tmp_path / "whole", 1, 6, "--num-workers", "0", *packed)
    output = tmp_path / "parts"
    run(ranks, data, output, 2, 2, "--num-workers", "1", *packed)
    packed = packed if pack else ("--micro-batch-size", "4")
    run(ranks, data, output, 2, 4, *(CP2 if pack else TP2), "--num-workers", "0", *packed)
    parts = run(ranks, data, output, 2, 6, *PP2, "--num-workers", "2", *packed)
    assert [float(one) for one in parts] == pytest.approx([float(one) for one in whole], rel=2e-5)


def gather_measures() -> list[Any]:
    import torch.distributed as dist

    group = host_group(dist.group.WORLD)
    assert group is not None
    measured = []

    def measure(draw: Draw) -> Measure:
        measured.append(draw.record)
        if draw.record == 99 and dist.get_rank() == 1:
            from megatron.core.models.mimo.errors import InputError

            raise InputError("a.jsonl, line 100: broken")
        return Measure(draw.record)

    late: list[Any] = [f"late {dist.get_rank()}"]
    shared = SharedMeasures(MeasuresHere(measure), group, late)
    shared.submit([Draw(0, 0, number) for number in range(5)])
    shared.submit([Draw(0, 0, number) for number in range(5, 8)])
    found = [one.length for one in shared.collect() if isinstance(one, Measure)]
    shared.submit([])
    assert shared.collect() == []
    shared.submit([Draw(0, 0, 7), Draw(0, 0, 99)])
    try:
        shared.collect()
        error = ""
    except ValueError as raised:
        error = str(raised)
    return [found, sorted(measured[: 8 // dist.get_world_size()]), late, error]


def test_each_rank_measures_its_share_and_all_fail_together(ranks: RankPool) -> None:
    first, second = ranks(2)(gather_measures)
    assert first[0] == second[0] == list(range(8))
    assert sorted(first[1] + second[1]) == list(range(8))
    assert "a.jsonl, line 100: broken" in first[3]
    assert "a.jsonl, line 100: broken" in second[3]
