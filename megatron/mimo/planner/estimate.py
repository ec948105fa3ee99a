"""A run's parameters, memory and FLOPs, from its arguments alone, stage by stage."""

from __future__ import annotations

import copy
from argparse import Namespace
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from megatron.core.models.mimo.errors import ConfigError
from megatron.mimo.arguments.component_flags import components_of, require_components
from megatron.mimo.data.micro_batches.batch import LENGTHS, Batch
from megatron.mimo.models.common.flops import (
    language_amounts,
    media_amounts,
    media_works,
    operations,
    shards_of,
    span_lengths,
    training_costs,
)
from megatron.mimo.planner.activations import (
    Activations,
    MicroBatch,
    Recomputation,
    kept_by_chunk,
)
from megatron.mimo.planner.memory import RankMemory, State, in_flight, state_of
from megatron.mimo.planner.pretended import build_stage, encoder_arguments
from megatron.mimo.planner.samples import Typical
from megatron.mimo.planner.saved import Kernels
from megatron.mimo.recipes.recipe import Recipe
from megatron.mimo.topology import Component

__all__ = ["Built", "Estimate", "Part", "build", "described", "estimate"]


@dataclass(frozen=True, kw_only=True)
class Part:
    """Parameters of a part of the model, over all ranks, each counted once."""

    total: int
    trained: int


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The memory, parameters and FLOPs of a run.

    Attributes:
        parts: name -> parameters.
        ranks: memory of a rank of each pipeline stage.
        recomputed: the same with all layers recomputed.
        tokens: real ones of a step.
        flops: of a step, as the mathematics needs them.
        recomputed_flops: those that are done again, as the run is.
        micro_batches: of a step, on one rank.
    """

    parts: dict[str, Part]
    ranks: list[RankMemory]
    recomputed: list[RankMemory]
    tokens: float
    flops: float
    recomputed_flops: float
    micro_batches: int

    @property
    def largest(self) -> RankMemory:
        """The memory of the rank that takes most."""
        return max(self.ranks, key=lambda rank: rank.whole)


@dataclass(frozen=True, kw_only=True)
class Built:
    """The model of a layout, on "meta".

    Attributes:
        stages: the chunks of the first rank of each pipeline stage.
        encoders: modality -> its module, of those that have a layout of their own.
        components: modules' own layouts; {} where they share one.
    """

    stages: list[list[Any]]
    encoders: Mapping[str, nn.Module]
    components: Mapping[str, Component]

    @property
    def apart(self) -> dict[range, list[str]]:
        """Ranks that the language model has no part in -> the modalities that are there."""
        found: dict[range, list[str]] = {}
        for name in self.encoders:
            ranks = self.components[name].ranks
            if not set(ranks) & set(self.components["language"].ranks):
                found.setdefault(ranks, []).append(name)
        return found


def build(recipe: Recipe, args: Namespace) -> Built:
    """Build the model of a run's layout, with no weights and no processes."""
    stages = [build_stage(recipe, args, n) for n in range(args.pipeline_model_parallel_size)]
    components = components_of(args.component, world_size=args.world_size)
    if components:
        require_components(components, stages[0][0].modality_submodules)
    encoders = {}
    for name, component in components.items():
        if name != "language":
            if component.pp > 1:
                raise ConfigError(
                    f"--component {component}: a plan knows encoders on one pipeline stage; plan "
                    f"{name} with pp=1, each of whose ranks takes more than one with pp="
                    f"{component.pp}"
                )
            (alone,) = build_stage(recipe, encoder_arguments(args, component.tp), 0)
            encoders[name] = alone.modality_submodules[name]
    return Built(stages=stages, encoders=encoders, components=components)


def estimate(built: Built, args: Namespace, typical: Typical, kernels: Kernels) -> Estimate:
    """Compute the estimate of a run.

    Args:
        built: the model, for the layout of ``args``.
        args: of the run, for a job of ``args.world_size`` ranks.
        typical: micro-batches of a rank.
        kernels: that compute.
    """
    first = built.stages[0][0]
    batches = [described(first, batch) for batch in typical.batches]
    micro_batches = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
    given = Recomputation.of(args)
    everything = Recomputation(granularity="full", method="uniform")
    flops, again, tokens = _flops(built, typical, given)
    repeats = args.global_batch_size / args.micro_batch_size / len(typical.batches)
    return Estimate(
        parts=_parts(built.stages, args),
        ranks=_ranks(built, args, batches, given, kernels, micro_batches),
        recomputed=_ranks(built, args, batches, everything, kernels, micro_batches),
        tokens=tokens * repeats,
        flops=flops * repeats,
        recomputed_flops=again * repeats,
        micro_batches=micro_batches,
    )


def described(model: Any, batch: Batch) -> MicroBatch:
    """The sizes of a micro-batch on which memory depends.

    Args:
        model: the chunk of a ``MimoModel`` that has the encoders.
        batch: as the collator makes it.
    """
    inputs = batch.get("modality_inputs") or {}
    ids_BS, positions = batch["input_ids"], batch.get("position_ids")
    works, rows = media_works(model, inputs)
    of_all = positions is not None and positions.dim() == 3
    return MicroBatch(
        tokens=ids_BS.numel(),
        positions=ids_BS.numel() if of_all else ids_BS.size(-1),
        labels=_labels(model, batch),
        works=works,
        rows=rows,
    )


def _labels(model: Any, batch: Batch) -> int | None:
    """Positions whose loss is computed; None for all."""
    mask_BS = batch.get("loss_mask")
    if mask_BS is None or not model.takes_label_rows:
        return None
    return int(mask_BS.count_nonzero())


def _flops(built: Built, typical: Typical, given: Recomputation) -> tuple[float, float, float]:
    """Of all these micro-batches: FLOPs, those that are done again, and tokens."""
    costs: Counter[str] = Counter()
    forward: Counter[str] = Counter()
    trained = False
    for number in range(len(built.stages[0])):
        for stage in built.stages:
            costs.update(training_costs(stage[number], trained_before=trained))
            trained |= any(one.requires_grad for one in stage[number].parameters())
            forward.update(_forward_costs(stage[number]))
    flops = again = tokens = 0.0
    for batch in typical.batches:
        lengths = batch.get(LENGTHS) or [batch["input_ids"].size(1)] * len(batch["input_ids"])
        amounts = language_amounts(
            costs,
            Counter(lengths),
            _labels(built.stages[0][0], batch),
            spans=span_lengths(batch),
        )
        amounts |= media_amounts(built.stages[0][0], batch.get("modality_inputs") or {})
        tokens += sum(lengths)
        flops += operations(costs, amounts)
        again += operations(forward, amounts) if given.granularity == "full" else 0.0
    return flops, again, tokens


def _forward_costs(chunk: Any) -> Mapping[str, float]:
    """The costs of the forward pass alone: as if nothing were trained."""
    wanted = [(one, one.requires_grad) for one in chunk.parameters()]
    for parameter, _ in wanted:
        parameter.requires_grad_(False)
    try:
        return training_costs(chunk)
    finally:
        for parameter, wants in wanted:
            parameter.requires_grad_(wants)


def _ranks(
    built: Built,
    args: Namespace,
    batches: Sequence[MicroBatch],
    recomputation: Recomputation,
    kernels: Kernels,
    micro_batches: int,
) -> list[RankMemory]:
    ranks, trained = [], False
    names = _names(len(built.stages), alone=not built.apart)
    held = _held_by_encoders(built, args, batches, recomputation, kernels)
    apart = {name for names in built.apart.values() for name in names}
    for number, chunks in enumerate(built.stages):
        flying = in_flight(args, number, micro_batches)
        largest = Activations()
        for chunk in chunks:
            receives = trained
            options = (
                kept_by_chunk(chunk, batch, recomputation, kernels, receives_gradient=receives)
                for batch in batches
            )
            most = max(options, key=lambda one: one.kept + one.working)
            largest = most if most.kept > largest.kept else largest
            trained |= any(one.requires_grad for one in chunk.parameters())
        rank = RankMemory(
            ranks=names[number],
            state=_state(chunks, args),
            activations=largest,
            micro_batches=flying,
            encoders_at_once=flying,
        )
        if built.components:
            beside = [held[name] for name in held if name not in apart]
            rank = _of_encoders(beside, rank.state, rank.ranks, rank)
        ranks.append(rank)
    for modalities in built.apart.values():
        alone = [held[name] for name in modalities]
        ranks.append(_of_encoders(alone, State(), " + ".join(modalities)))
    return ranks


@dataclass(frozen=True, kw_only=True)
class _Held:
    """The memory of each rank of encoders with a layout of their own.

    Attributes:
        state: between steps.
        kept: modality -> activations of its share of a step's media, encoded before the schedule.
        working: beside that.
    """

    state: State
    kept: dict[str, float]
    working: float


def _held_by_encoders(
    built: Built,
    args: Namespace,
    batches: Sequence[MicroBatch],
    recomputation: Recomputation,
    kernels: Kernels,
) -> dict[str, _Held]:
    held = {}
    step = args.global_batch_size / args.micro_batch_size
    for name, submodules in built.encoders.items():
        dp, one = built.components[name].dp, _Encoders(name, submodules)
        found = [kept_by_chunk(one, batch, recomputation, kernels) for batch in batches]
        share = 1.0 if args.encoder_activations == "recompute" else step / dp
        of_batch = max(each.encoders[name] for each in found)
        held[name] = _Held(
            state=state_of([submodules], args, (dp, dp)),
            kept={name: of_batch * min(share, step)},
            working=max(each.working for each in found),
        )
    return held


def _of_encoders(
    held: Sequence[_Held], state: State, ranks: str, beside: RankMemory | None = None
) -> RankMemory:
    """A rank of encoders, beside a part of the language model or alone."""
    activations = Activations() if beside is None else beside.activations
    working = max([activations.working, *(one.working for one in held if beside is None)])
    kept = {name: size for one in held for name, size in one.kept.items()}
    return RankMemory(
        ranks=ranks,
        state=sum((one.state for one in held), state),
        activations=replace(activations, encoders=kept, working=working),
        micro_batches=1 if beside is None else beside.micro_batches,
        encoders_at_once=1,
        is_apart=beside is None,
    )


class _Encoders:
    """One modality's module in place of a chunk."""

    language_model = None

    def __init__(self, name: str, submodules: nn.Module) -> None:
        self.modality_submodules = {name: submodules}
        self.config = copy.copy(next(_configs(submodules)))
        self.role = self

    def is_first_stage(self, name: str) -> bool:  # noqa: ARG002 (a role is asked by name)
        """True: encoders run where the first stage is."""
        return True


def _configs(module: nn.Module) -> Any:
    return (one.config for one in module.modules() if getattr(one, "config", None) is not None)


def _state(chunks: Sequence[Any], args: Namespace) -> State:
    """The state of the language model, and of encoders that share its layout."""
    modules: list[nn.Module] = []
    for chunk in chunks:
        modules += [chunk] if not args.component else [chunk.language_model, chunk.heads]
    dp = args.data_parallel_size * args.context_parallel_size
    etp = args.expert_tensor_parallel_size or args.tensor_model_parallel_size
    components = components_of(args.component, world_size=args.world_size)
    ranks = components["language"].size if components else args.world_size
    per_stage = ranks // args.pipeline_model_parallel_size
    experts = max(per_stage / (etp * args.expert_model_parallel_size), 1)
    return state_of(modules, args, (dp, experts))


def _parts(stages: list[list[Any]], args: Namespace) -> dict[str, Part]:
    from megatron.core.models.mimo.model.freezing import paths_by_parameter

    parts: dict[str, Part] = {}
    for chunk in (chunk for chunks in stages for chunk in chunks):
        for parameter, (path, *_) in paths_by_parameter(chunk).items():
            if getattr(parameter, "shared", False):
                continue  # the last stage's copy of the embedding
            size = parameter.numel() * shards_of(parameter, args)
            name = _part_name(path)
            part = parts.get(name, Part(total=0, trained=0))
            trained = part.trained + size * parameter.requires_grad
            parts[name] = Part(total=part.total + size, trained=trained)
    return parts


def _part_name(path: str) -> str:
    """The module and what is in it: "images.encoders", "language.decoder.experts"."""
    experts = ".experts" if ".experts." in path else ""
    return ".".join(path.split(".")[:2]) + experts


def _names(stages: int, *, alone: bool) -> list[str]:
    if stages == 1:
        return ["each rank" if alone else "language"]
    middle = [f"stage {number + 1}" for number in range(1, stages - 1)]
    return ["first stage", *middle, "last stage"]
