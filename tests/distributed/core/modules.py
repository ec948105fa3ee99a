"""The model with every module in a data-parallel wrapper of its own, and one step of training.

``layouts`` wraps the model as a whole; this is the other way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tests.distributed.core.layouts import (
    CLIP,
    EPSILON,
    LEARNING_RATE,
    Layout,
    _forward_step,
)
from tests.distributed.core.reference import (
    MICRO_BATCH,
    SEQUENCE,
    Design,
    Sample,
    build_model,
    transformer_config,
)
from tests.distributed.core.whole import Tensors, parts
from tests.distributed.schedule import run_schedule
from tests.rank_pool import model_parallel


def build(layout: Layout, weights: Tensors, frozen: Sequence[str] = ()) -> Any:
    """This rank's part of the model, every module in a wrapper of its own, and its parameters."""
    from megatron.core import parallel_state
    from megatron.core.distributed import finalize_model_grads

    groups = model_parallel(tp=layout.tp, pp=layout.pp)

    def finalize(_: Any, num_tokens: torch.Tensor, **keywords: Any) -> None:
        # Makes num_tokens the sum over the world.
        finalize_model_grads([model.language_model], num_tokens, **keywords)
        for module in model.modality_submodules.values():
            if isinstance(module, wrapper()):
                module.finish_grad_sync()
                module.scale_gradients(1.0 / num_tokens.item())

    config = transformer_config(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        finalize_model_grads_func=finalize,
    )
    model = build_model(
        config,
        Design(frozen=tuple(frozen)),
        groups,
        first=parallel_state.is_pipeline_first_stage(),
        last=parallel_state.is_pipeline_last_stage(),
    )
    held = list(parts(model))
    with torch.no_grad():
        for part in held:
            part.parameter.copy_(part.of(weights))

    wrap(model, layout)
    return model, held


def wrap(model: Any, layout: Layout) -> None:
    """Wraps the language model and every modality that is trained; undoes an earlier wrapping."""
    from megatron.core.distributed import DistributedDataParallelConfig

    def wrapped(module: Any) -> Any:
        module = module.module if isinstance(module, wrapper()) else module
        ddp_config = DistributedDataParallelConfig(
            use_distributed_optimizer=layout.distributed_optimizer
        )
        return wrapper()(model.config, ddp_config, module)

    model.language_model = wrapped(model.language_model)
    for name, module in model.modality_submodules.items():
        if any(parameter.requires_grad for parameter in module.parameters()):
            model.modality_submodules[name] = wrapped(module)


def wrapper() -> Any:
    from megatron.core.distributed import DistributedDataParallel

    return DistributedDataParallel


def build_optimizer(model: Any, layout: Layout, **changes: Any) -> Any:
    from megatron.core.models.mimo import get_mimo_optimizer
    from megatron.core.optimizer import OptimizerConfig

    settings: dict[str, Any] = {
        "optimizer": "adam",
        "lr": LEARNING_RATE,
        "adam_beta1": 0.9,
        "adam_beta2": 0.99,
        "adam_eps": EPSILON,
        "weight_decay": 0.0,
        "clip_grad": CLIP,
        "use_distributed_optimizer": layout.distributed_optimizer,
    }
    overrides = changes.pop("config_overrides", None)
    return get_mimo_optimizer(model, OptimizerConfig(**(settings | changes)), overrides)


def gradients(model: Any, layout: Layout, batch: list[Sample]) -> None:
    """Accumulates this rank's gradients of a global batch, by Megatron's schedule."""
    from megatron.core import parallel_state

    chunks = [batch[i : i + MICRO_BATCH] for i in range(0, len(batch), MICRO_BATCH)]
    mine = chunks[parallel_state.get_data_parallel_rank() :: layout.dp]
    model.zero_grad_buffer()
    run_schedule(
        [model],
        list(enumerate(mine)),
        _forward_step,
        seq_length=SEQUENCE,
        micro_batch_size=MICRO_BATCH,
    )


def train(model: Any, optimizer: Any, layout: Layout, batch: list[Sample]) -> Any:
    """One step; the gradient norm and the number of zeros."""
    optimizer.zero_grad()
    gradients(model, layout, batch)
    success, norm, zeros = optimizer.step()
    assert success
    return float(norm), zeros
