"""Megatron's parallel state, for functions that run on the pool's ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection


def model_parallel(
    *,
    tp: int = 1,
    pp: int = 1,
    cp: int = 1,
    ep: int = 1,
    etp: int | None = None,
    vpp: int | None = None,
    seed: int = 1234,
    around: Callable[[Any], Any] = lambda initialize: initialize,
) -> ProcessGroupCollection:
    """Initialises ``parallel_state`` and seeds the model-parallel generators; collective.

    Every rank of the default group calls it once (again after ``destroy_model_parallel``), with
    equal arguments. What is left of the world size is data parallel.

    Args:
        around: takes Megatron's ``initialize_model_parallel`` and gives what is called.

    Returns:
        The process groups, as Megatron's builders take them.
    """
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    around(parallel_state.initialize_model_parallel)(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        context_parallel_size=cp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
        virtual_pipeline_model_parallel_size=vpp,
    )
    model_parallel_cuda_manual_seed(seed)
    return ProcessGroupCollection.use_mpu_process_groups()
