"""A family's model outside of a training run: for conversion, verification and generation.

A training run has a recipe, data and Megatron's global arguments. Here there are a configuration
and a layout, and nothing global but Megatron's process groups.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from megatron.core.models.mimo.errors import ConfigError
from megatron.mimo.arguments.layout import check_model
from megatron.mimo.arguments.model_alone import settings_of
from megatron.mimo.backend import capabilities, select_backend
from megatron.mimo.backend.defaults import argument_defaults
from megatron.mimo.backend.job import end_job, leave_job
from megatron.mimo.models.common.family import Family
from megatron.mimo.models.common.place import Place, Places
from megatron.mimo.models.common.settings import LanguageSettings
from megatron.mimo.process.launcher import LaunchError, join_job
from megatron.mimo.process.quiet import warnings_shown

__all__ = ["build_model", "model_settings", "process_groups"]


@contextmanager
def process_groups(*, tp_size: int = 1, pp_size: int = 1, seed: int = 1) -> Iterator[torch.device]:
    """Torch's and Megatron's process groups, for the time of the block.

    Every process of the launcher's job enters it; without a launcher it is a job of one process.
    Data parallelism takes the processes that are left over. Groups that exist already are used,
    and stay, if their sizes are the same.

    Args:
        tp_size: tensor-parallel size.
        pp_size: pipeline-parallel size.
        seed: of Megatron's random states.

    Yields:
        The device that models and batches belong on.

    Raises:
        ConfigError: the number of processes is no multiple of ``tp_size * pp_size``, or groups of
            other sizes exist.
    """
    backend = select_backend()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    device = torch.device("cpu")
    made_job = not dist.is_initialized()
    if made_job:
        _start_job("nccl" if backend == "cuda" else "gloo")
    if backend == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    made_groups = not parallel_state.model_parallel_is_initialized()
    try:
        if made_groups:
            if dist.get_world_size() % (tp_size * pp_size):
                raise ConfigError(
                    f"{dist.get_world_size()} processes for tensor-parallel size {tp_size} * "
                    f"pipeline-parallel size {pp_size}; expected a multiple of "
                    f"{tp_size * pp_size}: torchrun --nproc-per-node {tp_size * pp_size} ..."
                )
            parallel_state.initialize_model_parallel(tp_size, pp_size)
        got = (
            parallel_state.get_tensor_model_parallel_world_size(),
            parallel_state.get_pipeline_model_parallel_world_size(),
        )
        if got != (tp_size, pp_size):
            raise ConfigError(
                f"process groups of tensor- and pipeline-parallel sizes {got} exist; expected "
                f"{(tp_size, pp_size)}"
            )
        model_parallel_cuda_manual_seed(seed)
        yield device
    except BaseException:
        if made_job:
            leave_job()
        raise
    finally:
        if made_groups and parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        if made_job:
            end_job()


def model_settings(
    family: Family,
    config: Any,
    *,
    tp_size: int = 1,
    pp_size: int = 1,
    dtype: torch.dtype = torch.float32,
    changes: Mapping[str, object] | None = None,
) -> LanguageSettings:
    """The settings of a family's language model, as in a run without flags that change it.

    Experts under tensor parallelism come with sequence parallelism, which a run has to ask for.

    Args:
        family: the model's.
        config: its Hugging Face configuration.
        tp_size: tensor-parallel size.
        pp_size: pipeline-parallel size.
        dtype: of the parameters.
        changes: further arguments of the model, by Megatron's names for them
            (``{"transformer_impl": "local"}``, ``{"sequence_parallel": True}``); they win.

    Raises:
        ConfigError: sizes that do not fit, what this machine cannot do, or no argument of a model.
    """
    machine = capabilities()
    values = {
        **argument_defaults(machine),
        **family.arguments(config),
        "tensor_model_parallel_size": tp_size,
        "pipeline_model_parallel_size": pp_size,
    }
    if tp_size > 1 and values.get("num_experts"):
        # Ranks with equal tokens would each count them among the gradients of the experts.
        values["sequence_parallel"] = True
    values |= changes or {}
    check_model(values)
    return settings_of(values, dtype=dtype)


def build_model(
    family: Family, config: Any, settings: LanguageSettings, *, device: torch.device
) -> Any:
    """This rank's part of the model, with random weights, on ``device``.

    Args:
        family: the model's.
        config: its Hugging Face configuration.
        settings: as :func:`model_settings` returns them.
        device: where the parameters are; "meta" for names and shapes without memory.

    Returns:
        A ``MimoModel`` in evaluation mode, in the dtype of the settings, not wrapped.
    """
    from megatron.core import parallel_state
    from megatron.core.models.mimo import MimoModel
    from megatron.core.process_groups_config import ProcessGroupCollection

    groups = ProcessGroupCollection.use_mpu_process_groups()
    place = Place(
        groups=groups,
        is_first_stage=parallel_state.is_pipeline_first_stage(),
        is_last_stage=parallel_state.is_pipeline_last_stage(),
    )
    with warnings_shown(shown=False), torch.device(device):
        built = family.build(config, settings, Places(language=place))
        model = MimoModel(built, cp_group=groups.cp, tp_group=groups.tp)
    model.pg_collection = groups
    return model.to(device=device, dtype=settings.transformer.params_dtype).eval()


def _start_job(backend: str) -> None:
    """Join the launcher's job, or be a job of one."""
    environment = dict(os.environ)
    try:
        join_job(environment)
    except LaunchError as error:
        raise ConfigError(str(error)) from error
    if environment["WORLD_SIZE"] == "1":
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return
    os.environ.update(environment)
    if backend == "nccl":
        torch.cuda.set_device(int(environment["LOCAL_RANK"]))
    dist.init_process_group(backend)
