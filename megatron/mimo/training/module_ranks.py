"""Megatron's global groups where modules are on ranks of their own: each rank has its module's.

Megatron's training loop asks ``parallel_state`` for sizes, stages and groups. On a rank of the
language model it answers for that; on a rank of encoders for a data-parallel group of these, which
has no batches of its own and counts the language model's.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch.distributed as dist

from megatron.mimo.arguments.component_flags import components_of
from megatron.mimo.topology import LANGUAGE, Component

__all__ = [
    "are_apart",
    "data_writer",
    "encodes_alone",
    "from_last_stage",
    "global_groups",
    "has_others",
    "in_every_chunk",
    "random_state",
]


def are_apart(components: Mapping[str, Component]) -> bool:
    """Whether modules are on ranks of their own."""
    return len({component.ranks for component in components.values()}) > 1


def has_others(args: Namespace) -> bool:
    """Whether the modules of a run with these arguments are on ranks of their own."""
    return are_apart(_components(args))


def encodes_alone(args: Namespace) -> bool:
    """Whether this rank has encoders and nothing of the language model."""
    components = _components(args)
    return bool(components) and args.rank not in components[LANGUAGE].ranks


def data_writer(args: Namespace) -> int:
    """The rank that writes the position of the data: the first that reads them."""
    components = _components(args)
    return components[LANGUAGE].rank_offset if components else 0


def from_last_stage(args: Namespace, value: Any) -> Any:
    """The language model's last pipeline stage's value on every rank that has another.

    Collective over the pipeline, and over the job where modules are on ranks of their own.
    """
    from megatron.core import mpu

    components = _components(args)
    box = [value]
    if are_apart(components):
        dist.broadcast_object_list(box, src=components[LANGUAGE].ranks[-1])
        return box[0]
    group = mpu.get_pipeline_model_parallel_group()
    if group.size() > 1:
        dist.broadcast_object_list(box, group_src=group.size() - 1, group=group)
    return box[0]


def random_state(components: Mapping[str, Component]) -> Callable[..., Any]:
    """Wraps ``get_rng_state``: in checkpoints ranks of encoders are copies of the language model's
    first rank.

    Encoders draw nothing of their own: the language model's ranks tell them a seed for each step.
    """

    def around(get_state: Callable[..., Any]) -> Callable[..., Any]:
        def state(*args: Any, **keywords: Any) -> Any:
            found, language = get_state(*args, **keywords), components[LANGUAGE]
            if dist.get_rank() in language.ranks or not hasattr(found, "replica_id"):
                return found
            return replace(
                found,
                global_shape=(language.pp, language.tp),
                global_offset=(0, 0),
                replica_id=language.size + dist.get_rank(),
            )

        return state

    return around


def in_every_chunk(components: Mapping[str, Component]) -> Callable[..., Any]:
    """Wraps the building of data loaders, which is collective over the whole job.

    Ranks of the language model do it for each of their interleaved chunks; ranks of encoders, which
    have one, as often.
    """

    def around(build: Callable[..., Any]) -> Callable[..., Any]:
        def built(provider: Callable[..., Any]) -> Any:
            from megatron.training.global_vars import get_args

            chunks = 1
            if dist.get_rank() not in components[LANGUAGE].ranks:
                chunks = get_args().virtual_pipeline_model_parallel_size or 1
            found = build(provider)
            for _ in range(chunks - 1):
                build(provider)
            return found

        return built

    return around


def _components(args: Namespace) -> Mapping[str, Component]:
    """Those of a run; none where arguments were not parsed for one."""
    texts = getattr(args, "component", None)
    return components_of(texts, world_size=args.world_size) if texts else {}


def global_groups(components: Mapping[str, Component]) -> Callable[..., Any]:
    """Wraps ``initialize_model_parallel``: it is called for each module's ranks, on all ranks.

    Args:
        components: modules on ranks of their own.
    """

    def around(initialize: Callable[..., Any]) -> Callable[..., Any]:
        def initialized(*sizes: Any, **keywords: Any) -> None:
            from megatron.core import parallel_state

            language = components[LANGUAGE]
            before = _globals(parallel_state)
            of_any_module = {
                name: keywords[name]
                for name in ("distributed_timeout_minutes", "create_gloo_process_groups")
                if name in keywords
            }
            initialize(
                *sizes, **keywords, rank_offset=language.rank_offset, local_world_size=language.size
            )
            found = _globals(parallel_state)
            for ranks in sorted({c.ranks for c in components.values()} - {language.ranks}, key=min):
                vars(parallel_state).update(before)
                initialize(rank_offset=ranks.start, local_world_size=len(ranks), **of_any_module)
                if dist.get_rank() in ranks:
                    found = _globals(parallel_state)
                    found["_MPU_DATA_PARALLEL_WORLD_SIZE"] = language.dp
            vars(parallel_state).update(found)

        return initialized

    return around


def _globals(parallel_state: Any) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(parallel_state).items()
        if name.startswith("_") and name.isupper()
    }
