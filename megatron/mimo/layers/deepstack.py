"""Deepstack: decoder layers that add levels of encoder rows to what they give.

A level is added at its rows' positions, behind its layer. Megatron hands a decoder's layers two
tensors that a decoder without cross-attention leaves alone, ``context`` and ``context_mask``.
Levels travel in them: recomputation saves them, runs a layer with those of its own micro-batch and
finds their gradients, and schedules need to know nothing of it.

Legend: S sequence, B micro-batch, H hidden, L levels of a stage's layers, n rows placed on this
rank.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from megatron.core.models.mimo.errors import ConfigError, UnsupportedError
from megatron.core.models.mimo.model.merging.levels import LevelRows
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

__all__ = ["TakesLevels", "deepstack_layers"]


def deepstack_layers(block: ModuleSpec, config: TransformerConfig) -> ModuleSpec:
    """A decoder's layers, each of which adds its level of encoder rows; changed in place.

    Args:
        block: as ``language_layer_spec`` gives it.
        config: of the language model.

    Raises:
        ConfigError: a setting by which layers are not called as they are, so that levels would be
            left out.
    """
    if config.cuda_graph_impl != "none":
        raise ConfigError(
            f"cuda_graph_impl is {config.cuda_graph_impl!r} with deepstack, whose layers take "
            "another number of rows in each micro-batch; set it to 'none' (--cuda-graph-impl none)"
        )
    if config.overlap_moe_expert_parallel_comm:
        raise ConfigError(
            "overlap_moe_expert_parallel_comm runs the pieces of decoder layers by a plan of its "
            "own, in which deepstack's levels have no place; leave it out "
            "(--overlap-moe-expert-parallel-comm)"
        )
    for layer in {id(one): one for one in block.submodules.layer_specs}.values():
        layer.module = _adding(layer.module)
    return block


class TakesLevels(nn.Module):
    """Before a GPTModel in the bases of a class: its ``forward`` takes ``level_rows``.

    Its layers are those of :func:`deepstack_layers`.
    """

    def forward(
        self,
        *args: Any,
        level_rows: tuple[LevelRows, ...] = (),
        loss_mask: Tensor | None = None,
        padding_mask: Tensor | None = None,
        **given: Any,
    ) -> Any:
        """GPTModel's, with levels for the layers of this stage, the first layer's first."""
        masks = {"loss_mask": loss_mask, "padding_mask": padding_mask}
        if level_rows:
            given["extra_block_kwargs"] = _as_context(level_rows)
        return super().forward(*args, **masks, **given)


def _as_context(levels: tuple[LevelRows, ...]) -> dict[str, Tensor]:
    """``context`` [L, n, H] and ``context_mask``: long [n], where they go in [S * B, H].

    Raises:
        UnsupportedError: modalities whose rows have different numbers of levels.
    """
    names = {tuple(level.rows) for level in levels}
    if len(names) > 1:
        raise UnsupportedError(
            f"levels of rows of {sorted(names)}; expected every level to be of the same "
            "modalities: give their encoders the same number of levels"
        )
    (modalities,) = names
    own = [level.own() for level in levels]
    places_n = torch.cat([own[0].plan.streams[name].rows_N for name in modalities])
    context_LnH = torch.stack([torch.cat([*level.rows.values()]) for level in own])
    return {"context": context_LnH, "context_mask": places_n}


@cache
def _adding(layer: type[TransformerLayer]) -> type[TransformerLayer]:
    """The layer, with its level added to what it gives."""
    base: Any = layer  # a class made here has no static base

    class Adding(base):
        def __init__(self, *args: Any, layer_number: int = 1, **given: Any) -> None:
            super().__init__(*args, layer_number=layer_number, **given)
            self.place = layer_number - 1  # among the layers of this stage

        def forward(
            self,
            *args: Any,
            context: Tensor | None = None,
            context_mask: Tensor | None = None,
            **given: Any,
        ) -> tuple[Tensor, Tensor | None]:
            hidden_SBH, _ = super().forward(*args, context=None, context_mask=None, **given)
            if context is not None and self.place < context.size(0):
                hidden_SBH = _AddAt.apply(hidden_SBH, context[self.place], context_mask)
            return hidden_SBH, context

    Adding.__name__ = Adding.__qualname__ = f"Deepstack{layer.__name__}"
    return Adding


class _AddAt(torch.autograd.Function):
    """Hidden states with rows added at their places; a new tensor, no view of one."""

    @staticmethod
    def forward(ctx: Any, hidden_SBH: Tensor, rows_nH: Tensor, places_n: Tensor) -> Tensor:
        ctx.save_for_backward(places_n)
        ctx.dtype = rows_nH.dtype
        added_SBH = hidden_SBH.clone(memory_format=torch.contiguous_format)
        flat_TH = added_SBH.view(-1, added_SBH.size(-1))
        flat_TH.index_add_(0, places_n, rows_nH.to(flat_TH.dtype))
        return added_SBH

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad_SBH = grad_outputs[0]
        (places_n,) = ctx.saved_tensors
        grad_nH = None
        if ctx.needs_input_grad[1]:
            flat_TH = grad_SBH.reshape(-1, grad_SBH.size(-1))
            grad_nH = flat_TH.index_select(0, places_n).to(ctx.dtype)
        return grad_SBH if ctx.needs_input_grad[0] else None, grad_nH, None
