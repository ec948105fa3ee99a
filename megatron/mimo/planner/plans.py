"""A plan: the estimate of a run, its time on a card, and what would make it fit there."""

from __future__ import annotations

import argparse
import os
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megatron.core.models.mimo.errors import MimoError
from megatron.mimo.arguments.command_line import parse_arguments
from megatron.mimo.arguments.early import parse_early
from megatron.mimo.backend import Capabilities
from megatron.mimo.backend.cards import Card
from megatron.mimo.checkpoints.assets import CONFIG, asset_folders
from megatron.mimo.models import read_hf_config
from megatron.mimo.planner.estimate import Built, Estimate, build, estimate
from megatron.mimo.planner.samples import Shape, Typical, typical_batches
from megatron.mimo.planner.saved import Kernels
from megatron.mimo.recipes import load_recipe
from megatron.mimo.recipes.recipe import Recipe
from megatron.mimo.topology import parse_component

__all__ = ["Plan", "Planner", "Remedy", "make_plan"]

# What a card holds beside PyTorch's tensors: its context, NCCL's buffers; and what the allocator
# loses to pieces that fit nothing.
CONTEXT = 1.5e9
LOST = 0.04
_REMEDIES = 2
_SIZES = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")


@dataclass(frozen=True, kw_only=True)
class Remedy:
    """Flags that make a run smaller.

    Attributes:
        flags: to be added.
        whole: bytes of the rank that takes most, with them.
        world_size: ranks that it takes then.
        fits: the card.
    """

    flags: tuple[str, ...]
    whole: float
    world_size: int
    fits: bool


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A plan, as it is printed.

    Attributes:
        recipe: its name.
        args: of the run.
        samples: what its micro-batches hold.
        found: the estimate.
        card: that it is for; None for none.
        share: of the card's rate that a step is assumed to reach.
        remedies: where it does not fit.
    """

    recipe: str
    args: Namespace
    samples: str
    found: Estimate
    card: Card | None
    share: float
    remedies: Sequence[Remedy] = ()

    @property
    def fits(self) -> bool:
        """Whether the run fits its card; True without a card."""
        return self.card is None or room(self.card) >= self.found.largest.whole

    @property
    def bubble(self) -> float:
        """Time in which the pipeline waits, divided by the time in which it computes."""
        args = self.args
        chunks = args.virtual_pipeline_model_parallel_size or 1
        stages = args.pipeline_model_parallel_size
        return float((stages - 1) / (chunks * max(self.found.micro_batches, 1)))

    @property
    def seconds(self) -> float | None:
        """Seconds of a step on the card; None if modules are on ranks of their own, and wait."""
        if self.card is None or any(rank.is_apart for rank in self.found.ranks):
            return None
        work = self.found.flops + self.found.recomputed_flops
        rate = self.card.tflops * 1e12 * self.share * self.args.world_size
        return work / rate * (1 + self.bubble)


@dataclass(frozen=True, kw_only=True)
class Planner:
    """Makes estimates of one run and of such as differ from it in a few flags.

    Attributes:
        flags: the run's.
        machine: that plans.
        world_size: ranks of the job; None for the least that its layout takes.
        shapes: of samples; [] for the recipe's own.
        on_gpu: the run is to compute on a GPU.
    """

    flags: Sequence[str]
    machine: Capabilities
    world_size: int | None
    shapes: list[Shape]
    on_gpu: bool
    _built: dict[tuple[Any, ...], Built] = field(default_factory=dict)

    def estimate(
        self, *more: str, ranks: int | None = None
    ) -> tuple[Recipe, Namespace, Typical, Estimate]:
        """The estimate with these flags added, for a job of so many ranks."""
        flags = [*self.flags, *more]
        recipe, args = self._arguments(flags, ranks or self.world_size)
        config = _config(recipe, args)
        typical = typical_batches(recipe, args, config, self.shapes)
        key = (*(getattr(args, name) for name in _SIZES), args.expert_model_parallel_size)
        key += (args.sequence_parallel, args.stage, args.virtual_pipeline_model_parallel_size)
        if key not in self._built:
            self._built[key] = build(recipe, args)
        kernels = Kernels(on_gpu=self.on_gpu, engine=self.on_gpu)
        return recipe, args, typical, estimate(self._built[key], args, typical, kernels)

    def _arguments(self, flags: list[str], ranks: int | None) -> tuple[Recipe, Namespace]:
        """The run's recipe and arguments, as the first rank of its job has them."""
        early = parse_early(flags)
        recipe = load_recipe(early.recipe)
        size = ranks or least_world_size(flags, early.config)
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(size))
        args = parse_arguments(
            replace(recipe, require=None),
            machine=self.machine,
            config=early.config,
            argv=[*flags, "--no-output"],
        )
        # The sizes of parameters are the same, and these are built without a GPU.
        args.transformer_impl, args.use_cpu_initialization = "local", True
        if args.padded_vocab_size is None:  # a run asks its tokenizer
            multiple = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
            args.padded_vocab_size = -(-args.vocab_size // multiple) * multiple
        return recipe, args


def make_plan(planner: Planner, *, card: Card | None, share: float) -> Plan:
    """The plan of a run; with remedies where it does not fit its card.

    Raises:
        MimoError: flags that a run would be refused with, or samples that do not fit.
    """
    recipe, args, typical, found = planner.estimate()
    plan = Plan(
        recipe=recipe.name, args=args, samples=typical.text, found=found, card=card, share=share
    )
    return plan if plan.fits else replace(plan, remedies=_remedies(planner, plan, recipe))


def room(card: Card) -> float:
    """Bytes of PyTorch's tensors that a card holds."""
    return (card.memory - CONTEXT) / (1 + LOST)


def least_world_size(flags: Sequence[str], config: Mapping[str, Any]) -> int:
    """The ranks that a layout takes at least.

    Args:
        flags: of the run.
        config: of its configuration file.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in (*_SIZES, "expert_model_parallel_size"):
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=int, default=int(config.get(name, 1)))
    parser.add_argument("--component", nargs="+", action="extend", default=[])
    given, _ = parser.parse_known_args(list(flags))
    components = [parse_component(text) for text in given.component]
    if components:
        return max(component.ranks.stop for component in components)
    tp, pp, cp = (getattr(given, name) for name in _SIZES)
    replica, experts = tp * cp, given.expert_model_parallel_size
    return int(pp * replica * max(1, -(-experts // replica)))


def _config(recipe: Recipe, args: Namespace) -> Any:
    """The Hugging Face configuration of the run's model; None for a model of no family."""
    if recipe.describe is None or recipe.hf_config is None:
        return None
    folders = asset_folders(args, CONFIG)
    return read_hf_config(folders[0]) if folders else recipe.hf_config()


def _remedies(planner: Planner, plan: Plan, recipe: Recipe) -> list[Remedy]:
    """The changes that help most, those that fit first; never more than ``_REMEDIES``."""
    found = []
    assert plan.card is not None
    for flags, ranks in _changes(plan.args, recipe):
        try:
            _, args, _, changed = planner.estimate(*flags, ranks=ranks)
        except MimoError:
            continue  # a run would be refused
        whole = changed.largest.whole
        if whole < 0.98 * plan.found.largest.whole:
            fits = whole <= room(plan.card)
            found.append(Remedy(flags=flags, whole=whole, world_size=args.world_size, fits=fits))
    here = plan.args.world_size
    found.sort(key=lambda one: (not one.fits, one.world_size > here, one.whole))
    return found[:_REMEDIES]


def _changes(args: Namespace, recipe: Recipe) -> list[tuple[tuple[str, ...], int]]:
    """Flags that may help, and the ranks that the job has then."""
    size, changes = args.world_size, list[tuple[str, ...]]()
    if args.recompute_granularity is None:
        changes.append(
            (
                *("--recompute-granularity", "full", "--recompute-method", "uniform"),
                *("--recompute-num-layers", "1"),
            )
        )
    if args.micro_batch_size > 1:
        changes.append(("--micro-batch-size", "1"))
    if not args.use_distributed_optimizer and args.data_parallel_size > 1:
        changes.append(("--use-distributed-optimizer",))
    if "lora" in recipe.presets and args.stage != "lora":
        changes.append(("--stage", "lora"))
    found = [(flags, size) for flags in changes]
    if not args.component:
        wider = ("--tensor-model-parallel-size", str(2 * args.tensor_model_parallel_size))
        longer = ("--pipeline-model-parallel-size", str(2 * args.pipeline_model_parallel_size))
        least = args.world_size // args.data_parallel_size
        for flags in (wider, longer):
            found.append((flags, size if size % (2 * least) == 0 else 2 * size))
        if args.data_parallel_size == 1 and not args.use_distributed_optimizer:
            found.append((("--use-distributed-optimizer",), 2 * size))
        if args.num_experts:
            more = 2 * args.expert_model_parallel_size
            found.append((("--expert-model-parallel-size", str(more)), max(size, 2 * size)))
    return found
