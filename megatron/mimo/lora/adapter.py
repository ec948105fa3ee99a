"""A low-rank adapter beside one of Megatron's tensor-parallel linear layers.

The layer keeps its place, its name and the names of its parameters; it gets a child ``adapter`` and
a class of its own, derived from the one it had, which adds the adapter's output to the layer's.

Shape legend: S sequence, B micro-batch, I input features, O output features, R rank. Of a layer
that splits its outputs (column), ``up`` is split and ``down`` replicated over tensor-parallel
ranks; of one that splits its inputs (row), the other way round.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import nullcontext
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional

from megatron.core.models.mimo.errors import UnsupportedError
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    get_cuda_rng_tracker,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    scatter_to_tensor_model_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from megatron.core.utils import get_tensor_model_parallel_group_if_none
from megatron.mimo.backend import capabilities
from megatron.mimo.backend.hooks import ADAPTED
from megatron.mimo.backend.patching import replace_in
from megatron.mimo.lora.merge import merge_adapter
from megatron.mimo.lora.settings import LoraSettings

__all__ = ["adapt", "adapted", "is_adaptable", "load_without_adapters", "merge"]

Split = Literal["column", "row"]


def is_adaptable(module: nn.Module) -> bool:
    """Whether an adapter can be put beside ``module``: a parallel linear layer, TE's included."""
    return isinstance(module, _kinds()["column"] + _kinds()["row"])


def adapt(linear: nn.Module, settings: LoraSettings, *, path: str, seed: int) -> None:
    """Put an adapter beside ``linear``; its output stays what it was, since ``up`` begins as 0.

    Args:
        linear: a layer for which :func:`is_adaptable`; its own parameters are left as they are.
        settings: rank, scale and dropout.
        path: of the layer in the whole model; with ``seed`` it decides the adapter's values, which
            so are the same in every parallel layout.
        seed: of the run.

    Raises:
        UnsupportedError: a layer of an expert, or one that has an adapter.
    """
    if hasattr(linear, "adapter"):
        raise UnsupportedError(f"{path} has an adapter already; merge it before adding another")
    if getattr(linear, "is_expert", False):
        raise UnsupportedError(
            f"{path} belongs to an expert, and experts take no adapters; give --lora-targets "
            "without it"
        )
    split: Split = "column" if isinstance(linear, _kinds()["column"]) else "row"
    generator = torch.Generator().manual_seed(zlib.crc32(path.encode()) ^ seed)
    linear.adapter = Adapter(linear, settings, split=split, path=path, generator=generator)
    replace_in(linear, ADAPTED, _class_with_adapter)


def adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(Name in ``model``, layer) of every layer that has an adapter."""
    for name, module in model.named_modules():
        if isinstance(module, _Adapted):
            yield name, module


def merge(linear: Any) -> None:
    """Add the adapter to the layer's weight and take it off; local on every rank."""
    with torch.no_grad():
        adapter = linear.adapter
        linear.weight.copy_(
            merge_adapter(linear.weight, adapter.down, adapter.up, adapter.settings.scale)
        )
    replace_in(linear, ADAPTED, lambda kind: kind.__mro__[2])
    del linear.adapter


def load_without_adapters(model: nn.Module) -> None:
    """Leave adapters out of the sharded state until ``model`` has loaded a checkpoint."""
    _put_in_checkpoint(model, False)

    def loaded(*_: Any) -> None:
        _put_in_checkpoint(model, True)
        hook.remove()

    hook = model.register_load_state_dict_post_hook(loaded)


def _put_in_checkpoint(model: nn.Module, included: bool) -> None:
    layers: list[Any] = [layer for _, layer in adapted(model)]
    for layer in layers:
        layer.adapter.is_in_checkpoint = included


class Adapter(nn.Module):
    """The two halves of an adapter, ``down`` [R, I] and ``up`` [O, R], as this rank holds them.

    Attributes:
        settings: rank, scale and dropout.
        is_in_checkpoint: whether the sharded state has it.
    """

    def __init__(
        self,
        linear: Any,
        settings: LoraSettings,
        *,
        split: Split,
        path: str,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        given = getattr(linear, "_tp_group", None) or getattr(linear, "tp_group", None)
        self._group: ProcessGroup = get_tensor_model_parallel_group_if_none(given)
        self.settings = settings
        self.is_in_checkpoint = True
        self._split = split
        self._is_gated = path.endswith(".linear_fc1") and linear.config.gated_linear_unit
        self._gathers = split == "column" and getattr(linear, "gather_output", False)
        self._scatters = split == "row" and not getattr(linear, "input_is_parallel", True)
        weight_OI = linear.weight
        outputs, inputs = weight_OI.shape
        like = {"dtype": weight_OI.dtype, "device": weight_OI.device}
        self.down = nn.Parameter(torch.empty(settings.rank, inputs, **like))
        self.up = nn.Parameter(torch.zeros(outputs, settings.rank, **like))
        parallel, replicated = (self.up, self.down) if split == "column" else (self.down, self.up)
        set_tensor_model_parallel_attributes(parallel, True, 0 if split == "column" else 1, 1)
        if _cuts_sequence(linear):  # a rank sees a part of the tokens: Megatron sums the gradients
            replicated.sequence_parallel = True  # type: ignore[attr-defined]
        if not weight_OI.is_meta:
            self._draw(generator)

    def _draw(self, generator: torch.Generator) -> None:
        """Values of ``down`` for the whole layer, of which a rank keeps its columns."""
        parts = self._group.size() if self._split == "row" else 1
        own = self._group.rank() if self._split == "row" else 0
        bound = (parts * self.down.size(1)) ** -0.5
        whole_RI = torch.empty(self.down.size(0), parts * self.down.size(1))
        whole_RI.uniform_(-bound, bound, generator=generator)
        with torch.no_grad():
            self.down.copy_(whole_RI.chunk(parts, dim=1)[own])

    def forward(self, hidden_SBI: Tensor, *, cuts_sequence: bool) -> Tensor:
        """What is added to the layer's output, of its shape.

        Args:
            hidden_SBI: the layer's input.
            cuts_sequence: sequence parallelism: S is cut over the tensor-parallel ranks outside of
                the layer. Generation turns it off for its time.
        """
        group = self._group
        if self._scatters:
            hidden_SBI = scatter_to_tensor_model_parallel_region(hidden_SBI, group=group)
        low_SBR = functional.linear(self._dropped(hidden_SBI, cuts_sequence), self.down)
        if self._split == "column":
            if cuts_sequence:
                low_SBR = gather_from_sequence_parallel_region(low_SBR, group=group)
            else:
                low_SBR = copy_to_tensor_model_parallel_region(low_SBR, group=group)
        elif cuts_sequence:
            low_SBR = reduce_scatter_to_sequence_parallel_region(low_SBR, group=group)
        else:
            low_SBR = reduce_from_tensor_model_parallel_region(low_SBR, group=group)
        added_SBO = functional.linear(low_SBR, self.up) * self.settings.scale
        if self._gathers:
            added_SBO = gather_from_tensor_model_parallel_region(added_SBO, group=group)
        return added_SBO

    def _dropped(self, hidden_SBI: Tensor, cuts_sequence: bool) -> Tensor:
        if not self.training or self.settings.dropout == 0:
            return hidden_SBI
        # What is equal on all ranks is dropped equally, what is each rank's own is not.
        is_own = cuts_sequence or self._split == "row"
        with get_cuda_rng_tracker().fork() if is_own else nullcontext():
            return functional.dropout(hidden_SBI, self.settings.dropout)

    def sharded_state(
        self, prefix: str, sharded_offsets: Any, metadata: dict[str, Any] | None
    ) -> dict[str, Any]:
        """Sharded tensors, as the layer's own weight has them; nothing without is_in_checkpoint."""
        if not self.is_in_checkpoint:
            return {}
        axis = {"up": 0} if self._split == "column" else {"down": 1}
        metadata = metadata or {}
        group = metadata.get("dp_cp_group")
        state: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            {"down": self.down, "up": self.up},
            prefix,
            axis,
            sharded_offsets,
            tp_group=self._group,
            dp_cp_group=group,
        )
        if self._is_gated:
            state[prefix + "up"] = apply_swiglu_sharded_factory(
                state[prefix + "up"],
                sharded_offsets,
                metadata.get("singleton_local_shards", False),
                tp_group=self._group,
                dp_group=group,
            )
        return state

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """A model without adapters loads into one with them, which keeps what they are."""
        if any(prefix + half in state_dict for half in ("down", "up")):
            super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class _Adapted:
    """What the class of a layer with an adapter adds to that of the layer."""

    adapter: Adapter

    def forward(self, hidden_SBI: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The layer's output and bias, the adapter's output added."""
        result = super().forward(hidden_SBI, *args, **kwargs)  # type: ignore[misc]
        added = self.adapter(_normed(self, hidden_SBI), cuts_sequence=_cuts_sequence(self))
        if isinstance(result, tuple):
            return (result[0] + added, *result[1:])
        return result + added

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The layer's, as without an adapter, and the adapter's."""
        own = f"{prefix}adapter."
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)  # type: ignore[misc]
        state = {key: value for key, value in state.items() if not key.startswith(own)}
        return state | self.adapter.sharded_state(own, sharded_offsets, metadata)


def _cuts_sequence(linear: Any) -> bool:
    return bool(linear.sequence_parallel)


def _normed(linear: Any, hidden_SBI: Tensor) -> Tensor:
    """The input of the product: Transformer Engine has layers that normalise theirs first."""
    weight_I = getattr(linear, "layer_norm_weight", None)
    if weight_I is None:
        return hidden_SBI
    if getattr(linear, "zero_centered_gamma", False):
        weight_I = weight_I + 1
    shape, eps = hidden_SBI.shape[-1:], linear.eps
    if linear.normalization == "RMSNorm":
        return functional.rms_norm(hidden_SBI, shape, weight_I, eps)
    return functional.layer_norm(hidden_SBI, shape, weight_I, linear.layer_norm_bias, eps)


@cache
def _class_with_adapter(kind: Any) -> type:
    return type(f"{kind.__name__}WithAdapter", (_Adapted, kind), {})


@cache
def _kinds() -> dict[Split, tuple[type, ...]]:
    kinds: dict[Split, tuple[type, ...]] = {
        "column": (ColumnParallelLinear,),
        "row": (RowParallelLinear,),
    }
    if capabilities().has_transformer_engine():
        from megatron.core.extensions import transformer_engine as te

        kinds["column"] += (te.TEColumnParallelLinear, te.TELayerNormColumnParallelLinear)
        kinds["row"] += (te.TERowParallelLinear,)
    return kinds
