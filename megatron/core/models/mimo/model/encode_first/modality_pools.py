"""The modalities of a model on grids: who shares the work of each, and how these ranks meet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megatron.core.models.mimo.comm.messages import Messages
from megatron.core.models.mimo.comm.pools import Pool, pools_of
from megatron.core.models.mimo.config import MIMO_LANGUAGE_MODULE_KEY
from megatron.core.models.mimo.config.grids import Geometry
from megatron.core.models.mimo.model.base import MimoModel
from megatron.core.models.mimo.model.encode_first.encode_ahead import draws
from megatron.core.models.mimo.model.encode_first.encoder_calls import Modality
from megatron.core.models.mimo.model.encode_first.row_stream import Lines
from megatron.core.models.mimo.submodules.base import ModalitySubmodules
from megatron.core.models.mimo.submodules.encoder_output import levels_of
from megatron.core.utils import unwrap_model


class ModalityPools:
    """The modalities of a model and the groups in which their pools meet.

    All ranks of the job make it together.

    Args:
        model: this rank's first chunk.
        recompute: whether the encoders' activations are recomputed.

    Attributes:
        disjoint: encoders are on ranks of their own.
        language: grid of the language model.
        replica: number of the language model's replica that this rank is in; None on ranks of
            encoders alone.
        reads: this rank places rows.
        modalities: those that this rank encodes, or whose rows its replica gets.
        groups: modality -> all ranks of this one's pool; None where that is this rank alone.
        lines: modality -> messages between the ranks that meet, in the disjoint layout.
    """

    def __init__(self, model: MimoModel, *, recompute: bool) -> None:
        grids = dict(model.mimo_config.module_to_grid_map or {})
        rank = dist.get_rank()
        self.disjoint = model.disjoint_rows is not None
        self.language = Geometry.of(MIMO_LANGUAGE_MODULE_KEY, grids[MIMO_LANGUAGE_MODULE_KEY])
        here = self.language.positions.get(rank)
        self.replica = None if here is None else here.dp
        self.reads = here is not None and here.pp == 0
        self.modalities: list[Modality] = []
        self.groups: dict[str, dist.ProcessGroup | None] = {}
        self.lines: dict[str, Lines] = {}
        self._groups = _Groups()
        geometries = {
            name: Geometry.of(name, grids[name])
            for name in model.mimo_config.modality_submodules_spec
        }
        facts = _facts_of_all(model)
        trained: set[int] = set()  # ranks of encoders whose backward waits for the language model
        for name, geometry in geometries.items() if self.disjoint else ():
            if any(facts[rank][name].is_trained for rank in geometry.ranks):
                trained.update(geometry.ranks)
        for name, geometry in geometries.items():
            pools = pools_of(geometry, self.language)
            self._meet(name, pools)
            stages = [
                facts[geometry.where(pp=stage)[0]][name] for stage in range(geometry.sizes["pp"])
            ]
            waits = stages[0].encoders_wait
            if self.disjoint:
                waits = any(stage.is_trained or stage.draws for stage in stages)
            submodule = dict(model.modality_submodules.items()).get(name)
            self.modalities += [
                Modality(
                    name=name,
                    submodule=submodule,
                    pool=pool,
                    like_H=_row_of(model),
                    recompute=recompute,
                    levels=stages[-1].levels,
                    trainable=tuple(stage.is_trained for stage in stages),
                    stage=None if submodule is None else geometry.positions[rank].pp,
                    goes_ahead=not waits and not trained.intersection(geometry.ranks),
                )
                for pool in pools
                if rank in pool.ranks
            ]

    def draw_seed(self, modality: Modality, *, trains: bool) -> int | None:
        """A seed for what an encoder draws in this step, from the generator that is checkpointed.

        That is the language model's, whose ranks tell encoders on ranks of their own.

        Args:
            modality: one of these.
            trains: the model is in training; its encoders say it for themselves.
        """
        submodule = modality.submodule
        if not (trains if submodule is None else submodule.training):
            return None
        seed = torch.randint(1 << 30, (1,))
        group = self.groups.get(modality.name)
        if len(modality.pool.owners[0]) > 1 and group is not None:
            # tensor-parallel ranks of an encoder may be of different pipeline stages
            seed = seed.to(modality.like_H.device)
            dist.broadcast(seed, group_src=0, group=group)
        return int(seed.item())

    def destroy(self) -> None:
        """Release the groups; a second call does nothing."""
        self._groups.destroy()

    def _meet(self, name: str, pools: Sequence[Pool]) -> None:
        if not self.disjoint:
            self.groups[name] = self._groups.of("", [pool.ranks for pool in pools])
            return
        kinds = ("inputs", "rows", "gradients")  # none waits behind another
        meeting = [pool.meeting for pool in pools]
        groups = {kind: self._groups.of(f"{name} {kind}", meeting) for kind in kinds}
        self.lines[name] = Lines(**{kind: Messages(group) for kind, group in groups.items()})


@dataclass(frozen=True, kw_only=True)
class _Facts:
    """What other ranks have to know of a modality's module.

    Attributes:
        levels: further levels of every row.
        is_trained: some of it is.
        draws: it may draw random numbers.
        encoders_wait: its encoders are trained, may draw, or cannot be run without the projection.
    """

    levels: int
    is_trained: bool
    draws: bool
    encoders_wait: bool


def _facts_of_all(model: MimoModel) -> list[dict[str, _Facts]]:
    """Rank -> the facts of each modality that it has; all ranks call it."""
    own = {
        name: _Facts(
            levels=levels_of(module),
            is_trained=_is_trained(module),
            draws=draws(module),
            encoders_wait=_encoders_wait(unwrap_model(module)),
        )
        for name, module in model.modality_submodules.items()
    }
    everyone: list[dict[str, _Facts]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, own)
    return everyone


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _encoders_wait(module: Any) -> bool:
    if getattr(type(module), "forward", None) is not ModalitySubmodules.forward:
        return True
    return _is_trained(module.encoders) or draws(module.encoders)


def _row_of(model: MimoModel) -> torch.Tensor:
    """A vector like a row of the language model, on the device of this rank's part."""
    config, device = model.config, next(model.parameters()).device
    return torch.empty(config.hidden_size, dtype=config.params_dtype, device=device)


class _Groups:
    """Process groups, made once for each set of ranks and use."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, tuple[tuple[int, ...], ...]], dist.ProcessGroup | None] = {}

    def of(self, use: str, groups: Sequence[tuple[int, ...]]) -> dist.ProcessGroup | None:
        """This rank's group; None where all groups have one rank. All ranks call it.

        Args:
            use: the same ranks have another group for another use.
            groups: the ranks of each; no rank is in two.
        """
        key = use, tuple(groups)
        if key not in self._known and all(len(ranks) == 1 for ranks in groups):
            self._known[key] = None
        elif key not in self._known:
            own: Any = dist.new_subgroups_by_enumeration([[*ranks] for ranks in groups])[0]
            self._known[key] = own
        return self._known[key]

    def destroy(self) -> None:
        """Release them; a second call does nothing."""
        for group in self._known.values():
            if group is not None:
                dist.destroy_process_group(group)
        self._known = {}
