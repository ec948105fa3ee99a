"""A rank's part of a model, built without weights and without the job that it would be part of.

Parameters are on "meta". Process groups are those of one replica of the model, and none of their
other members exists: building a module asks how many ranks there are and which one this is.
"""

from __future__ import annotations

import copy
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from megatron.mimo.models.common.place import Place, Places
from megatron.mimo.recipes.recipe import Recipe
from megatron.mimo.training.trained_parts import apply_parts

__all__ = ["build_stage", "encoder_arguments"]


def build_stage(recipe: Recipe, args: Namespace, stage: int) -> list[Any]:
    """The chunks that the first rank of a pipeline stage has, frozen and adapted as in the run."""
    with _pretended(args, stage):
        return list(_chunks(recipe, args))


def encoder_arguments(args: Namespace, tp: int) -> Namespace:
    """Arguments of a model whose encoders are as those of a component of this size."""
    alone = copy.copy(args)
    alone.tensor_model_parallel_size, alone.pipeline_model_parallel_size = tp, 1
    alone.context_parallel_size = alone.expert_model_parallel_size = 1
    alone.virtual_pipeline_model_parallel_size = alone.expert_tensor_parallel_size = None
    alone.sequence_parallel = alone.tp_comm_overlap = False
    alone.pipeline_model_parallel_layout = None
    return alone


@contextmanager
def _pretended(args: Namespace, stage: int) -> Iterator[None]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    stages = args.pipeline_model_parallel_size
    ranks = args.tensor_model_parallel_size * args.context_parallel_size
    etp = args.expert_tensor_parallel_size or args.tensor_model_parallel_size
    experts = args.expert_model_parallel_size * etp
    while ranks % experts:  # experts are spread over replicas too
        ranks *= 2 if experts % (2 * ranks) == 0 else experts
    dist.init_process_group(
        "fake", store=FakeStore(), rank=stage * ranks, world_size=stages * ranks
    )
    try:
        parallel_state.initialize_model_parallel(
            args.tensor_model_parallel_size,
            stages,
            args.virtual_pipeline_model_parallel_size,
            context_parallel_size=args.context_parallel_size,
            expert_model_parallel_size=args.expert_model_parallel_size,
            expert_tensor_parallel_size=args.expert_tensor_parallel_size,
            create_gloo_process_groups=False,
        )
        model_parallel_cuda_manual_seed(1)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _chunks(recipe: Recipe, args: Namespace) -> Iterator[Any]:
    from megatron.core import parallel_state
    from megatron.core.models.mimo import MimoModel
    from megatron.core.process_groups_config import ProcessGroupCollection

    groups = ProcessGroupCollection.use_mpu_process_groups()
    count = args.virtual_pipeline_model_parallel_size
    for number in range(count or 1):
        chunk = number if count else None
        at = {"ignore_virtual": count is None, "vp_stage": chunk}
        place = Place(
            groups=groups,
            is_first_stage=parallel_state.is_pipeline_first_stage(**at),
            is_last_stage=parallel_state.is_pipeline_last_stage(**at),
            chunk=chunk,
        )
        with torch.device("meta"):
            built = recipe.build_model(args, Places(language=place))
            model = MimoModel(built, cp_group=groups.cp, tp_group=groups.tp)
            apply_parts(model, args)
        yield model.to(device="meta", dtype=args.params_dtype).train()
