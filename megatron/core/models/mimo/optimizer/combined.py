"""The optimizers of all modules as one: one gradient norm, one loss scale, one verdict."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megatron.core.models.mimo.config.grids import same_ranks
from megatron.core.models.mimo.errors import ConfigError, UnsupportedError
from megatron.core.models.mimo.optimizer.state import give_back, prime, take_out
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer, OptimizerConfig
from megatron.core.optimizer.grad_scaler import MegatronGradScaler

if TYPE_CHECKING:
    from megatron.core.hyper_comm_grid import HyperCommGrid
    from megatron.core.process_groups_config import ProcessGroupCollection


@dataclass
class ModuleOptimizerInfo:
    """The optimizer of one module on this rank.

    The fields are positional for scripts written against megatron-core 0.19.

    Args:
        optimizer: as ``get_megatron_optimizer`` returns it. A rank without the module has one
            without parameters, which takes part in the collectives of the others; None where no
            rank trains the module.
        grid: the module's process grid; None where modules share Megatron's groups.
        pg_collection: the groups the optimizer was built with; None for Megatron's global ones.
        is_active: this rank holds parameters of the module that are trained. Without, an optimizer
            that has parameters is left alone.
    """

    optimizer: MegatronOptimizer | None
    grid: HyperCommGrid | None
    pg_collection: ProcessGroupCollection | None
    is_active: bool


class SharedGradScaler(MegatronGradScaler):
    """One loss scale for all modules, which moves once per step.

    The loss is scaled once, so every module has to be unscaled by the same number; and a module
    must not move the scale before all ranks know whether the step is skipped.

    Args:
        scaler: the scaler that decides.
    """

    def __init__(self, scaler: MegatronGradScaler) -> None:
        self._scaler = scaler

    @property
    def scale(self) -> torch.Tensor:
        """The loss scale, float32 [1]."""
        return self._scaler.scale

    @property
    def inv_scale(self) -> torch.Tensor:
        """One over the loss scale, float32 [1]."""
        return self._scaler.inv_scale

    def update(self, found_inf: bool) -> None:
        """What one module found; ``settle`` follows with what all ranks agree on."""

    def settle(self, found_inf: bool) -> None:
        """Move the scale, knowing whether any module on any rank found inf or NaN."""
        self._scaler.update(found_inf)

    def state_dict(self) -> dict[str, Any]:
        """State of the scaler that decides."""
        return dict(self._scaler.state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` gave; every module's optimizer does it, with equal values."""
        self._scaler.load_state_dict(state_dict)


class MimoOptimizer(ChainedOptimizer):
    """Steps the optimizers of all modules as one optimizer of the whole model.

    Gradients are clipped by one norm over all modules. A step that finds inf or NaN in any module
    on any rank is skipped on all ranks. Every rank makes one, with the same modules in the same
    order, and calls ``step`` and ``sharded_state_dict`` together with the others: they
    communicate over the default process group. The optimizers given become this one's parts:
    their gradient scalers are replaced by one.

    Args:
        module_infos: module name -> its optimizer.
        config: configuration of all of them.
        device: for the values that ranks agree on; None for the parameters' device.

    Attributes:
        module_infos: as given.
        is_stub_optimizer: nothing is trained on this rank.
        chained_optimizers: Megatron's optimizers, those of one module after those of another.
    """

    def __init__(
        self,
        module_infos: Mapping[str, ModuleOptimizerInfo],
        config: OptimizerConfig,
        *,
        device: torch.device | None = None,
    ) -> None:
        grids = {name: info.grid for name, info in module_infos.items() if info.grid is not None}
        self._disjoint = bool(grids) and not same_ranks(grids)
        self.module_infos = dict(module_infos)
        parts = [
            part
            for info in module_infos.values()
            if _takes_part(info)
            for part in links_of(info.optimizer)
        ]
        super().__init__(parts)
        self.config = config
        self._device = device if device is not None else _device_of(self)
        self._scaler = _share_scaler(parts)
        held = [name for name, info in module_infos.items() if _holds_state(info)]
        holders: list[list[str]] = [held]
        if dist.is_initialized():
            holders = [[] for _ in range(dist.get_world_size())]
            dist.all_gather_object(holders, held)
        self.is_stub_optimizer = not held
        # A module's first holder writes what its holders have in common.
        before = holders[: dist.get_rank()] if dist.is_initialized() else []
        self._replica = {name: sum(name in names for names in before) for name in held}

    @torch.no_grad()
    def prepare_grads(self) -> bool:
        """Unscale every module's gradients.

        All ranks call it: one all-reduce (max) over the default group, after those of the parts.

        Returns:
            Whether any module on any rank has inf or NaN; the same on all ranks.
        """
        found_inf = _agree(super().prepare_grads(), dist.ReduceOp.MAX, self._device)
        if self._scaler is not None:
            self._scaler.settle(found_inf)
        return found_inf

    @torch.no_grad()
    def step(self) -> tuple[bool, Any, int | None]:
        """Clip by the norm over all modules, and step them all or none.

        All ranks call it: the success is reduced (min) over the default group.

        Returns:
            ``(success, grad_norm, num_zeros)``. A skipped step has neither norm nor zeros;
            zeros are counted with ``log_num_zeros_in_grad``.
        """
        if self.chained_optimizers or self._disjoint:
            success, grad_norm, num_zeros = super().step()
        else:
            success, grad_norm, num_zeros = not self.prepare_grads(), 0.0, None
        success = _agree(bool(success), dist.ReduceOp.MIN, self._device)
        return success, grad_norm, num_zeros

    @torch.no_grad()
    def get_grad_norm(self) -> Any:
        """The norm over all modules; with modules on ranks of their own, all ranks call it."""
        if not self._disjoint:
            return super().get_grad_norm()
        squares = [
            sum((part.get_grad_norm() or 0.0) ** 2 for part in parts)
            for parts in _parts_by_module(self.module_infos)
        ]
        return math.sqrt(sum(_of_holders(squares, torch.float64, self._device)))

    @torch.no_grad()
    def count_zeros(self) -> int:
        """Zeros in the gradients of all modules; collective as ``get_grad_norm``."""
        if not self._disjoint:
            return int(super().count_zeros())
        counts = [
            sum(part.count_zeros() for part in parts)
            for parts in _parts_by_module(self.module_infos)
        ]
        return int(sum(_of_holders(counts, torch.int64, self._device)))

    def get_loss_scale(self) -> torch.Tensor:
        """What the loss is multiplied by before backward: float32 [1]."""
        if not self.chained_optimizers:
            return torch.ones(1, device=self._device)
        scale: torch.Tensor = super().get_loss_scale()
        return scale

    def reload_model_params(self, state_dict: Mapping[str, Any] | None = None) -> None:
        """Take the model's parameters over into the optimizers' own copies.

        Raises:
            UnsupportedError: (a ``RuntimeError``) a state dict, whose values would be more
                precise than the parameters'.
        """
        if state_dict is not None:
            raise UnsupportedError(
                "reload_model_params takes no state_dict here: it has no way from a whole model's "
                "state to its modules' optimizers; load the model first, then call it without one"
            )
        super().reload_model_params()

    def state_dict(self) -> dict[str, Any]:
        """Module name -> what Megatron's optimizer of it gives; None where this rank has none."""
        state: dict[str, Any] = dict.fromkeys(self.module_infos)
        for name in self._replica:
            state[name] = self._primed(name).state_dict()
        return state

    @torch.no_grad()  # Megatron copies into fp32 parameters, leaves of the graph
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what ``state_dict`` gave, or what was loaded into ``sharded_state_dict``.

        Raises:
            ConfigError: (a ``ValueError``) a module that is trained here has no state, or one
                with other parameter groups.
        """
        for name in self._replica:
            module_state = state_dict.get(name)
            if not module_state:
                raise ConfigError(
                    f"the checkpoint holds no optimizer state of module {name!r}, only of "
                    f"{[key for key, value in state_dict.items() if value]}; load the model "
                    "without the optimizer, or freeze the modules that were frozen then"
                )
            optimizer: Any = self.module_infos[name].optimizer
            give_back(name, module_state, links_of(optimizer))
            optimizer.load_state_dict(module_state)

    def sharded_state_dict(
        self, model_sharded_state_dict: dict[str, Any], is_loading: bool = False, **keywords: Any
    ) -> dict[str, Any]:
        """State for ``dist_checkpointing``: module name -> state, empty where this rank has none.

        Every key starts with ``mimo.<module>.``. What is not a tensor (parameter groups, step,
        loss scale, kind of sharding) is an object ``optimizer.mimo.<module>[.<part>].<what>`` of
        its own, because only rank 0 writes the common file and it may not hold the module.

        Args:
            model_sharded_state_dict: the whole model's.
            is_loading: the state is about to be loaded into.
            keywords: ``metadata``, as Megatron's optimizers take it.
        """
        metadata = keywords.get("metadata") or {}
        if metadata.get("distrib_optim_fully_reshardable_mem_efficient"):
            _require_gloo_groups(self.chained_optimizers)
        state: dict[str, Any] = {name: {} for name in self.module_infos}
        for name, replica in self._replica.items():
            state[name] = self._primed(name).sharded_state_dict(
                model_sharded_state_dict, is_loading, **keywords
            )
            take_out(name, state[name], links_of(self.module_infos[name].optimizer), replica)
        return state

    def _primed(self, name: str) -> Any:
        optimizer = self.module_infos[name].optimizer
        for part in links_of(optimizer):
            prime(part)
        return optimizer


def links_of(optimizer: Any) -> list[Any]:
    """Megatron's optimizers in one: the links of a ``ChainedOptimizer``, else itself."""
    if optimizer is None:
        return []
    if type(optimizer) is ChainedOptimizer:
        return list(optimizer.chained_optimizers)
    return [optimizer]


def _parts_by_module(module_infos: Mapping[str, ModuleOptimizerInfo]) -> Iterator[list[Any]]:
    for info in module_infos.values():
        yield links_of(info.optimizer) if _takes_part(info) else []


def _of_holders(values: list[Any], dtype: torch.dtype, device: torch.device) -> list[Any]:
    """A number for each module, from the ranks that hold it; others say 0. Collective."""
    known = torch.tensor([float(value) for value in values], dtype=dtype, device=device)
    dist.all_reduce(known, op=dist.ReduceOp.MAX)
    return list(known.tolist())


def _agree(value: bool, operation: Any, device: torch.device) -> bool:
    if not dist.is_initialized():
        return value
    verdict = torch.tensor([value], dtype=torch.int32, device=device)
    dist.all_reduce(verdict, op=operation)
    return bool(verdict.item())


def _require_gloo_groups(optimizers: list[Any]) -> None:
    for part in optimizers:
        if getattr(part, "data_parallel_group_gloo", True) is None:
            raise ConfigError(
                "distrib_optim_fully_reshardable_mem_efficient gathers over gloo groups, and the "
                "optimizer was built without; give get_mimo_optimizer use_gloo_process_groups=True"
            )


def _takes_part(info: ModuleOptimizerInfo) -> bool:
    """True where this rank's optimizer of a module steps, be it for the collectives alone."""
    return info.is_active or not _has_parameters(info.optimizer)


def _has_parameters(optimizer: Any) -> bool:
    return any(group["params"] for part in links_of(optimizer) for group in part.param_groups)


def _holds_state(info: ModuleOptimizerInfo) -> bool:
    return info.is_active and not getattr(info.optimizer, "is_stub_optimizer", True)


def _share_scaler(parts: list[Any]) -> SharedGradScaler | None:
    """Give all parts one gradient scaler, the first one's; None where they have none."""
    scaled = [part for part in parts if getattr(part, "grad_scaler", None)]
    if not scaled:
        return None
    shared = SharedGradScaler(scaled[0].grad_scaler)
    for part in scaled:
        part.grad_scaler = shared
    return shared


def _device_of(optimizer: ChainedOptimizer) -> torch.device:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            return torch.device(parameter.device)
    return torch.get_default_device()
