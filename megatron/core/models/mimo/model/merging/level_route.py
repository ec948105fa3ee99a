"""Levels of encoder rows on their way through the pipeline stages (deepstack).

Encoders run on the first stage. Levels whose layers are behind it travel with the hidden states:
one tensor from stage to stage, at first the hidden states, then the rows of every level that a
later layer adds, and of these rows only those that have a place on this rank. So a level ends where
it is used, nothing is sent for text alone, and backward brings the gradients the same way.

Legend: S sequence, B micro-batch, H hidden, M vectors of a message, n rows placed on this rank;
``S_local`` after context/sequence sharding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from megatron.core import parallel_state
from megatron.core.models.mimo.alignment import AlignmentPlan
from megatron.core.models.mimo.errors import InputError, UnsupportedError
from megatron.core.models.mimo.model.merging.levels import (
    LevelRows,
    MergedSequence,
    plan_of_own_rows,
)
from megatron.core.models.mimo.signatures import names_argument
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.core.utils import unwrap_model


@dataclass(frozen=True, kw_only=True)
class LevelRoute:
    """Which levels a part of the language model adds, and which it hands on.

    Attributes:
        levels: modality -> how many levels its rows have.
        first: the number of this part's first layer, from 0.
        layers: how many it has.
        is_first: nothing arrives: it is where the encoders are.
        crosses: the layer of some level is behind the first part of the language model.
    """

    levels: Mapping[str, int] = field(default_factory=dict)
    first: int = 0
    layers: int = 0
    is_first: bool = True
    crosses: bool = False

    @property
    def total(self) -> int:
        """How many levels the modality with the most of them has."""
        return max(self.levels.values(), default=0)

    @property
    def arrives(self) -> bool:
        """The message to this part brings levels, or room for them."""
        return self.crosses and not self.is_first and self.first < self.total

    @property
    def leaves(self) -> bool:
        """The message from this part brings levels, or room for them."""
        return self.crosses and self.first + self.layers < self.total

    def added(self, levels: Sequence[LevelRows]) -> tuple[LevelRows, ...]:
        """Those of ``MergedSequence.levels`` that this part's layers add."""
        return tuple(levels[: self.layers] if self.leaves else levels)

    def message(self, hidden_SBH: torch.Tensor, levels: Sequence[LevelRows]) -> torch.Tensor:
        """What goes to the next part: [M, 1, H], or the hidden states where no level goes on.

        Args:
            hidden_SBH: output of this part's layers, [S_local, B, H].
            levels: levels of this part and those behind it, as in ``MergedSequence``.
        """
        if not self.leaves:
            return hidden_SBH
        rows = [
            rows_nH.to(hidden_SBH.dtype).unsqueeze(1)
            for level in levels[self.layers :]
            for rows_nH in level.own().rows.values()
        ]
        # The result is no view: Megatron frees what it has sent.
        return torch.cat([hidden_SBH.flatten(0, 1).unsqueeze(1), *rows])

    def message_shape(self, plan: AlignmentPlan, *, hidden_size: int) -> list[int]:
        """Shape of what arrives, for a sender and a receiver that agree on the plan."""
        places = plan.sequence_length * plan.batch_size
        if not self.arrives:
            return [plan.sequence_length, plan.batch_size, hidden_size]
        rows = sum(count for level in self._arriving(plan) for count in level.values())
        return [places + rows, 1, hidden_size]

    def received(self, message_M1H: torch.Tensor, plan: AlignmentPlan) -> MergedSequence:
        """Hidden states and levels of a message.

        Args:
            message_M1H: what the part before has made by :meth:`message`.
            plan: this rank's plan.

        Raises:
            InputError: a message of another length than the plan's.
        """
        expected = self.message_shape(plan, hidden_size=message_M1H.size(-1))
        if list(message_M1H.shape) != expected:
            raise InputError(
                f"hidden states with levels of rows have arrived as {list(message_M1H.shape)}; "
                f"expected {expected} by this stage's alignment plan: give every stage that of the "
                "same micro-batch"
            )
        places = plan.sequence_length * plan.batch_size
        counts = self._arriving(plan)
        sizes = [count for level in counts for count in level.values()]
        hidden_LH, *rows = torch.split(message_M1H.squeeze(1), [places, *sizes])
        parts, own = iter(rows), plan_of_own_rows(plan)
        levels = tuple(
            LevelRows(rows={name: next(parts) for name in level}, plan=own, tp_group=None)
            for level in counts
        )
        hidden_SBH = hidden_LH.view(plan.sequence_length, plan.batch_size, -1)
        return MergedSequence(hidden_SBH=hidden_SBH, levels=levels)

    def _arriving(self, plan: AlignmentPlan) -> list[dict[str, int]]:
        """Modality -> rows with a place here, of each level that arrives."""
        with_rows = {name: one for name, one in self.levels.items() if plan.counts.get(name)}
        return [
            {
                name: plan.streams[name].rows_N.numel()
                for name, levels in with_rows.items()
                if number < levels
            }
            for number in range(self.first, max(with_rows.values(), default=0))
        ]


def untaken_levels(modalities: Sequence[str], levels: int, language_model: str) -> UnsupportedError:
    """The error for levels that a language model of that class does not take."""
    return UnsupportedError(
        f"the encoders of {', '.join(map(repr, modalities))} give {levels} levels of their rows, "
        f"and {language_model} does not take any; use a language model whose forward has "
        "level_rows, or encoders without levels"
    )


def level_route(specs: Mapping[str, ModuleSpec], language_model: nn.Module) -> LevelRoute:
    """The route of a model's levels through this rank's part of its language model.

    Where levels cross from stage to stage, messages have lengths of their own: the language model's
    ``config.variable_seq_lengths`` is switched on, by which Megatron's schedules exchange shapes.

    Args:
        specs: modality -> spec; rows have as many levels as there are ``level_projections``.
        language_model: this rank's part of the language model.
    """
    counts = {
        name: len((spec.submodules or {}).get("level_projections") or ())
        for name, spec in specs.items()
    }
    levels = {name: count for name, count in counts.items() if count}
    bare: Any = unwrap_model(language_model)
    if not levels or not names_argument(bare.forward, "level_rows"):
        return LevelRoute()
    config, total = bare.config, max(levels.values())
    if config.num_layers < total:
        raise UnsupportedError(
            f"encoders give {total} levels of their rows for the first {total} decoder layers, and "
            f"the language model has {config.num_layers}; give it more layers"
        )
    if config.pipeline_model_parallel_size == 1:
        return LevelRoute(levels=levels, layers=config.num_layers)
    groups, chunk = getattr(bare, "pg_collection", None), getattr(bare, "vp_stage", None)
    stage = (
        parallel_state.get_pipeline_model_parallel_rank() if groups is None else groups.pp.rank()
    )
    crosses = _layers_of_first_part(config) < total
    if crosses:
        config.variable_seq_lengths = True
    return LevelRoute(
        levels=levels,
        first=get_transformer_layer_offset(config, chunk, stage),
        layers=len(bare.decoder.layers),
        is_first=stage == 0 and not chunk,
        crosses=crosses,
    )


def _layers_of_first_part(config: Any) -> int:
    """Decoder layers beside the embedding: of stage 0's first chunk, on every rank."""
    layout = config.pipeline_model_parallel_layout
    if layout is not None:
        return sum(kind is LayerType.decoder for kind in layout.layout[0][0])
    chunk = None if config.virtual_pipeline_model_parallel_size is None else 0
    layers: int = get_num_layers_to_build(config, vp_stage=chunk, pp_rank=0)
    return layers
