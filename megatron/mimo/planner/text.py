"""A plan as a person reads it, and as a program does."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from megatron.mimo.planner.memory import RankMemory
from megatron.mimo.planner.plans import CONTEXT, LOST, Plan, room
from megatron.mimo.process.console import format_count

__all__ = ["plan_text", "plan_values"]


def plan_text(plan: Plan) -> str:
    """The plan as lines."""
    found = plan.found
    lines = [_opening(plan), f"micro-batches: {plan.samples}", ""]
    lines.append(f"{'parameters':<34}{'total':>10}{'trained':>10}")
    for name, part in found.parts.items():
        trained = format_count(part.trained) if part.trained else "-"
        lines.append(f"  {name:<32}{format_count(part.total):>10}{trained:>10}")
    total, trained = (
        sum(getattr(part, kind) for part in found.parts.values()) for kind in ("total", "trained")
    )
    lines += [f"  {'all':<32}{format_count(total):>10}{format_count(trained):>10}", ""]
    lines += _memory(plan)
    lines += ["", *_step(plan)]
    if plan.card is not None:
        lines += ["", *_fit(plan)]
    return "\n".join(lines)


def plan_values(plan: Plan) -> dict[str, Any]:
    """The plan as numbers: bytes, FLOPs, seconds."""
    found, args = plan.found, plan.args
    values: dict[str, Any] = {
        "recipe": plan.recipe,
        "world_size": args.world_size,
        "layout": _sizes(args),
        "samples": plan.samples,
        "parameters": {name: dataclasses.asdict(part) for name, part in found.parts.items()},
        "memory": [_rank_values(rank) for rank in found.ranks],
        "memory_all_recomputed": [rank.whole for rank in found.recomputed],
        "tokens_per_step": found.tokens,
        "flops_per_step": found.flops,
        "recomputed_flops_per_step": found.recomputed_flops,
        "micro_batches": found.micro_batches,
        "fits": plan.fits,
    }
    if plan.card is not None:
        values |= {
            "card": dataclasses.asdict(plan.card),
            "achieved_share": plan.share,
            "pipeline_bubble": plan.bubble,
            "seconds_per_step": plan.seconds,
            "room": room(plan.card),
            "remedies": [dataclasses.asdict(remedy) for remedy in plan.remedies],
        }
    return values


def _rank_values(rank: RankMemory) -> dict[str, Any]:
    state = dataclasses.asdict(rank.state)
    return {
        "ranks": rank.ranks,
        **state,
        "activations": rank.kept,
        "working": rank.activations.working,
        "all": rank.whole,
        "micro_batches_under_way": rank.micro_batches,
    }


def _opening(plan: Plan) -> str:
    args = plan.args
    dtype = str(args.params_dtype).removeprefix("torch.")
    stage = f", stage {args.stage}" if args.stage else ""
    sizes = " ".join(f"{name} {size}" for name, size in _sizes(args).items())
    processes = f"{args.world_size} rank{'s' * (args.world_size > 1)}"
    return (
        f"recipe {plan.recipe}{stage}: {processes}, {sizes}, {dtype}, global batch "
        f"{args.global_batch_size} of {args.seq_length} tokens"
    )


def _sizes(args: Namespace) -> dict[str, int]:
    return {
        "tp": args.tensor_model_parallel_size,
        "pp": args.pipeline_model_parallel_size,
        "cp": args.context_parallel_size,
        "ep": args.expert_model_parallel_size,
        "dp": args.data_parallel_size,
    }


def _memory(plan: Plan) -> list[str]:
    """A column for the first, a middle and the last pipeline stage, and for encoders apart."""
    pairs = list(zip(plan.found.ranks, plan.found.recomputed, strict=True))
    both = [pair for pair in pairs if not pair[0].is_apart]
    if len(both) > 3:
        middle = max(both[1:-1], key=lambda pair: pair[0].whole)
        both = [both[0], middle, both[-1]]
    both += [pair for pair in pairs if pair[0].is_apart]
    ranks = [rank for rank, _ in both]
    unit, name = (1e9, "GB") if max(rank.whole for rank in ranks) > 1e9 else (1e6, "MB")

    def row(title: str, value: Callable[[RankMemory], float]) -> str:
        return f"  {title:<32}" + "".join(f"{value(rank) / unit:>13.2f}" for rank in ranks)

    head = f"memory of a rank, {name}"
    lines = [f"{head:<34}" + "".join(f"{rank.ranks:>13}" for rank in ranks)]
    lines += [
        row("weights", lambda rank: rank.state.weights),
        row("gradients", lambda rank: rank.state.gradients),
        row("optimizer", lambda rank: rank.state.optimizer),
        row("activations", lambda rank: rank.kept),
        row("working", lambda rank: rank.activations.working),
        row("in all", lambda rank: rank.whole),
    ]
    again = "".join(f"{rank.whole / unit:>13.2f}" for _, rank in both)
    lines.append(f"  {'in all, every layer recomputed':<32}{again}")
    if any(rank.micro_batches != 1 for rank in ranks):
        counts = "".join(f"{rank.micro_batches:>13}" for rank in ranks)
        lines.append(f"  {'micro-batches under way':<32}{counts}")
    return lines


def _step(plan: Plan) -> list[str]:
    found = plan.found
    again = found.recomputed_flops
    twice = f", and {again / 1e12:.3g} TFLOP again in recomputation" if again else ""
    step = f"a step: {format_count(found.tokens)} tokens, {found.flops / 1e12:.4g} TFLOP{twice}"
    if plan.card is None:
        return [step]
    if plan.seconds is None:
        return [step, "expected time: not known where modules have ranks of their own"]
    waits = f", the pipeline waiting {plan.bubble:.0%} on top" if plan.bubble else ""
    return [
        step,
        f"expected on {plan.args.world_size} x {plan.card.name}: {plan.seconds:.3g} s, "
        f"{format_count(found.tokens / plan.seconds)} tokens/s; assumed: {plan.share:.0%} of "
        f"{plan.card.tflops:g} TFLOP/s{waits}; communication is not counted apart",
    ]


def _fit(plan: Plan) -> list[str]:
    assert plan.card is not None
    most, size = plan.found.largest, plan.card.memory / 1e9
    beside = f"{CONTEXT / 1e9:g} GB of context and {LOST:.0%} lost to the allocator"
    if plan.fits:
        free = (room(plan.card) - most.whole) / 1e9
        return [f"fits: {free:.1f} GB are free of {size:g} GB, {beside} left out"]
    parts = {
        "weights": most.state.weights,
        "gradients": most.state.gradients,
        "optimizer state": most.state.optimizer,
        "activations": most.kept,
        "what the backward pass works with": most.activations.working,
    }
    part = max(parts, key=lambda name: parts[name])
    lines = [
        f"does not fit: {most.whole / 1e9:.1f} GB on {most.ranks} of a card with {size:g} GB, "
        f"{beside} left out; the largest part: {part}, {parts[part] / 1e9:.1f} GB"
    ]
    for remedy in plan.remedies:
        ranks = f" on {remedy.world_size} ranks" * (remedy.world_size != plan.args.world_size)
        says = "fits" if remedy.fits else "still does not fit"
        flags = " ".join(remedy.flags)
        lines.append(f"  {flags}{ranks}: {remedy.whole / 1e9:.1f} GB, {says}")
    return lines
