"""Frozen encoders encode a step before the one that needs it: the same bits, earlier."""

from __future__ import annotations

from collections import deque
from itertools import islice
from typing import Any

import pytest
import torch

from tests.distributed.core import disjoint, grids
from tests.distributed.core.disjoint import DisjointLayout
from tests.distributed.core.grids import GridLayout
from tests.distributed.core.layouts import model_inputs, run_reference
from tests.distributed.core.reference import MICRO_BATCH, SEQUENCE, Design, make_batches
from tests.distributed.core.whole import Tensors
from tests.distributed.schedule import SUM_AND_COUNT, Sizes, loss_of_labels
from tests.rank_pool import RankPool

COLOCATED = GridLayout(pp=2)
APART = DisjointLayout(images=Sizes(dp=2), sounds=Sizes(tp=2), together=True, by="encode first")
DESIGN = Design(frozen=("images", "sounds"))
PROJECTING = Design(frozen=("images.encoders", "sounds"))  # trains a projection
STEPS = 3


class Stream:
    """Micro-batches that can be seen before they are taken, or others than those that are."""

    def __init__(self, batches: list[dict[str, Any]], kind: str) -> None:
        self._left, self._kind = deque(batches), kind

    def __next__(self) -> dict[str, Any]:
        return self._left.popleft()

    def peek(self, count: int) -> list[dict[str, Any]]:
        seen = [*islice(self._left, count)]
        return [dict(batch) for batch in seen] if self._kind == "others" else seen


@pytest.mark.parametrize(
    "design",
    [pytest.param(DESIGN, marks=pytest.mark.wide), PROJECTING],
    ids=["frozen", "but the projection"],
)
def test_on_the_ranks_of_the_language_model(ranks: RankPool, design: Design) -> None:
    (expected,) = ranks(1)(run_reference, design)
    world = ranks(COLOCATED.world_size)
    found = {
        kind: world(run_colocated, design, expected.weights, kind) for kind in ("alone", "ahead")
    }
    assert [values for values, _ in found["ahead"]] == [values for values, _ in found["alone"]]
    trained = 4 if design is PROJECTING else 0  # parameters of a projection
    assert [len(values) for values, _ in found["alone"]] == [trained, 4 * STEPS + trained]
    for (_, alone), (_, ahead) in zip(found["alone"], found["ahead"], strict=True):
        first, second, third = alone
        assert first > 0
        assert ahead == [first + second, third, 0]


def test_on_ranks_of_their_own(ranks: RankPool) -> None:
    """Two micro-batches are encoded ahead; again, where the next step is not what was shown."""
    (expected,) = ranks(1)(run_reference, DESIGN)
    world = ranks(APART.world_size)
    kinds = ("alone", "ahead", "others")
    found = {kind: world(run_apart, expected.weights, kind) for kind in kinds}
    for kind in kinds:
        assert [losses for losses, _ in found[kind]] == [losses for losses, _ in found["alone"]]
    assert len(found["alone"][-1][0]) == 4 * STEPS
    first, second, third = calls_of_all(found["alone"])
    early, *rest = calls_of_all(found["ahead"])
    of_second = early - first
    of_third = rest[0] - (second - of_second)
    assert of_second > 0
    assert of_third > 0
    assert rest[1] == third - of_third
    assert calls_of_all(found["others"]) == [first + of_second, second + of_third, third]


def calls_of_all(found: list[tuple[list[float], list[int]]]) -> list[int]:
    """Calls of encoders in each step, over all ranks."""
    return [sum(of_ranks) for of_ranks in zip(*(calls for _, calls in found), strict=True)]


def run_colocated(design: Design, weights: Tensors, kind: str) -> tuple[list[float], list[int]]:
    built = grids.build(COLOCATED, design, weights)
    batches = [
        model_inputs(
            samples[at : at + MICRO_BATCH], COLOCATED, DESIGN, dtype=torch.float32, plan=True
        )
        for samples in make_batches()
        for at in range(0, len(samples), MICRO_BATCH)
    ]
    return run_steps(built.chunks, batches, kind)


def run_apart(weights: Tensors, kind: str) -> tuple[list[float], list[int]]:
    from megatron.core.pipeline_parallel import schedules

    built = disjoint.build(APART, DESIGN, weights)
    samples = [sample for batch in make_batches() for sample in batch]
    batches = disjoint.micro_batches(APART, DESIGN, built, samples)
    groups = built.modules["language"].groups
    return run_steps(
        [built.model],
        batches,
        kind,
        schedule=schedules.forward_backward_no_pipelining,
        pg_collection=groups,
    )


def run_steps(
    chunks: list[Any],
    batches: list[dict[str, Any]],
    kind: str,
    schedule: Any = None,
    **groups: Any,
) -> tuple[list[float], list[int]]:
    """Losses of the micro-batches and gradients of encoders, and calls of these in each step.

    On the language model's ranks a step ends for this count where gradients are reduced. A call is
    counted where encoders run, not where their output is projected.
    """
    from megatron.core.models.mimo.model.encode_first import schedule as encode_first
    from megatron.core.models.mimo.model.encode_first.encoder_calls import EncoderCalls

    count = len(batches) // STEPS
    done = 0
    step = encode_first.EncodeFirst(
        chunks,
        schedule=schedule,
        ahead=None if kind == "alone" else lambda: count if done < STEPS - 1 else 0,
    )
    calls = [0]
    original = EncoderCalls.forward, EncoderCalls.encode, encode_first.finalize_model_grads

    def forward(self: Any, call: Any, hidden: Any = None) -> Any:
        calls[-1] += call is not None and hidden is None
        return original[0](self, call, hidden)

    def encode(self: Any, call: Any) -> Any:
        calls[-1] += 1
        return original[1](self, call)

    def reduced(*arguments: Any, **keywords: Any) -> Any:
        calls.append(0)
        return original[2](*arguments, **keywords)

    EncoderCalls.forward, EncoderCalls.encode = forward, encode  # type: ignore[method-assign]
    encode_first.finalize_model_grads = reduced
    stream, losses = Stream(batches, kind), []
    try:
        for done in range(STEPS):
            for chunk in chunks:
                chunk.train()
                chunk.zero_grad_buffer()
            reports = step(
                forward_step_func=loss_of_labels,
                data_iterator=stream,
                model=chunks,
                num_microbatches=count,
                seq_length=SEQUENCE,
                micro_batch_size=MICRO_BATCH,
                **groups,
            )
            losses += [report[SUM_AND_COUNT][0].item() for report in reports]
            if len(calls) == done + 1:  # a rank of encoders alone
                calls.append(0)
    finally:
        EncoderCalls.forward, EncoderCalls.encode = original[:2]  # type: ignore[method-assign]
        encode_first.finalize_model_grads = original[2]
    return losses + gradient_norms(chunks[0]), calls[:-1]


def gradient_norms(model: Any) -> list[float]:
    """Of the parameters of encoders and projections."""
    return [
        parameter.main_grad.double().norm().item()
        for module in model.modality_submodules.values()
        for parameter in module.parameters()
        if parameter.requires_grad
    ]
