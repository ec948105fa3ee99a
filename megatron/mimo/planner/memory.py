"""The memory of one rank: the state of its part of the model, and activations of micro-batches."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatron.mimo.planner.activations import Activations

__all__ = ["RankMemory", "State", "in_flight", "state_of"]


@dataclass(frozen=True, kw_only=True)
class State:
    """Bytes that a rank holds between steps.

    Attributes:
        weights: parameters and buffers.
        gradients: the buffers that they are summed in.
        optimizer: fp32 weights and moments, or what the flags make of them.
    """

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0

    @property
    def whole(self) -> float:
        """All bytes together."""
        return self.weights + self.gradients + self.optimizer

    def __add__(self, other: State) -> State:
        return State(
            weights=self.weights + other.weights,
            gradients=self.gradients + other.gradients,
            optimizer=self.optimizer + other.optimizer,
        )


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """The memory of a rank, in bytes.

    Attributes:
        ranks: which it stands for: "first stage", "last stage".
        state: held between steps.
        activations: of one micro-batch in the largest of the rank's chunks.
        micro_batches: chunks of micro-batches that are under way at most.
        encoders_at_once: micro-batches whose encoders' activations are kept together.
        is_apart: the rank has no part in the language model.
    """

    ranks: str
    state: State
    activations: Activations
    micro_batches: int
    encoders_at_once: float
    is_apart: bool = False

    @property
    def kept(self) -> float:
        """Activations of all micro-batches that wait for their backward pass."""
        language = self.activations.layers + self.activations.ends
        encoders = sum(self.activations.encoders.values())
        return language * self.micro_batches + encoders * self.encoders_at_once

    @property
    def whole(self) -> float:
        """The most memory that a step needs at any time."""
        return self.state.whole + self.kept + self.activations.working


def state_of(modules: Sequence[nn.Module], args: Namespace, copies: tuple[float, float]) -> State:
    """Weights, gradients and optimizer state of some modules of a rank.

    Args:
        modules: on "meta", frozen and adapted as they are trained.
        args: the run's.
        copies: ranks that hold the same parameter, and the same of an expert.
    """
    weights = gradients = optimizer = 0.0
    parameters = {id(one): one for module in modules for one in module.parameters()}
    for parameter in parameters.values():
        size = parameter.numel()
        weights += size * parameter.element_size()
        if not parameter.requires_grad:
            continue
        in_fp32 = args.accumulate_allreduce_grads_in_fp32
        gradients += size * (4 if in_fp32 else parameter.element_size())
        is_expert = not getattr(parameter, "allreduce", True)
        shared = copies[is_expert] if args.use_distributed_optimizer else 1
        optimizer += size * _optimizer_bytes(args, parameter) / shared
    buffers = {id(one): one for module in modules for one in module.buffers()}
    weights += sum(buffer.numel() * buffer.element_size() for buffer in buffers.values())
    return State(weights=weights, gradients=gradients, optimizer=optimizer)


def in_flight(args: Namespace, stage: int, micro_batches: int) -> int:
    """Chunks of micro-batches whose activations a pipeline stage keeps at most.

    Args:
        args: the run's.
        stage: of the rank.
        micro_batches: of a step, on one rank.
    """
    stages, chunks = args.pipeline_model_parallel_size, args.virtual_pipeline_model_parallel_size
    if chunks is None:
        return int(min(stages - stage, micro_batches))
    ahead = (stages - stage - 1) * 2 + (chunks - 1) * stages + 1
    return int(min(ahead, micro_batches * chunks))


def _optimizer_bytes(args: Namespace, parameter: Tensor) -> float:
    """Bytes of optimizer state for one element of a parameter."""
    if args.optimizer == "sgd":
        moments = 4 if args.sgd_momentum else 0
    else:
        moments = _bytes(args.exp_avg_dtype) + _bytes(args.exp_avg_sq_dtype)
    if parameter.dtype == torch.float32:
        return moments
    return moments + _bytes(args.main_params_dtype)


def _bytes(dtype: Any) -> int:
    return torch.empty(0, dtype=dtype).element_size()
