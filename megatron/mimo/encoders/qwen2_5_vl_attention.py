"""Attention of Qwen2.5-VL's vision encoder: rotated by line and column, within windows or frames.

Legend: T patches of all items, H heads of this tensor-parallel rank, D head size.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron.core.models.mimo.errors import InputError
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.mimo.encoders.qwen2_5_vl_geometry import PatchSequence
from megatron.mimo.layers import encoder_layer_spec

__all__ = ["WindowAttention", "rotated", "window_layer_spec"]


def window_layer_spec(config: TransformerConfig, *, full_layers: Collection[int]) -> ModuleSpec:
    """Layers of the encoder, without the norm after the last.

    Args:
        config: of the encoder.
        full_layers: numbers, from 0, of layers whose attention spans a frame; that of the others
            spans a window.

    Raises:
        ConfigError: see :func:`encoder_layer_spec`.
    """
    block = encoder_layer_spec(config)
    block.submodules.layer_norm = None
    for layer in {id(one): one for one in block.submodules.layer_specs}.values():
        attention = layer.submodules.self_attention.submodules
        attention.core_attention = partial(
            WindowAttention, inner=attention.core_attention, full_layers=frozenset(full_layers)
        )
    return block


def rotated(heads_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Turn feature i and feature i + D / 2 of each head by an angle, in fp32.

    Args:
        heads_THD: queries or keys.
        cos_TD: [T, D / 2] fp32.
        sin_TD: likewise.
    """
    first, second = heads_THD.float().chunk(2, dim=-1)
    cos, sin = cos_TD[:, None], sin_TD[:, None]
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.to(heads_THD.dtype)


class WindowAttention(MegatronModule):
    """In the place of a ``core_attention``; takes packed sequences that are a ``PatchSequence``.

    Args:
        config: of the encoder.
        layer_number: from 1.
        attn_mask_type: passed on.
        attention_type: passed on.
        inner: builds the attention that does the work.
        full_layers: see :func:`window_layer_spec`.
        given: passed on.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        *,
        inner: Any,
        full_layers: frozenset[int],
        **given: Any,
    ) -> None:
        super().__init__(config=config)
        self.is_full = layer_number - 1 in full_layers
        self.inner = inner(
            config=config,
            layer_number=layer_number,
            attn_mask_type=attn_mask_type,
            attention_type=attention_type,
            **given,
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        packed_seq_params: PackedSeqParams | None = None,
        **given: Any,
    ) -> Tensor:
        """Rotate queries and keys [T, H, D], then attend: [T, H * D].

        Raises:
            InputError: ``packed_seq_params`` are not a ``PatchSequence``.
        """
        if not isinstance(packed_seq_params, PatchSequence):
            raise InputError(
                f"packed_seq_params are {type(packed_seq_params).__name__}; expected a "
                "PatchSequence: this attention is Qwen2.5-VL's vision encoder's alone"
            )
        turns = (packed_seq_params.cos_TD, packed_seq_params.sin_TD)
        borders = packed_seq_params if self.is_full else packed_seq_params.windows
        out: Tensor = self.inner(
            rotated(query, *turns),
            rotated(key, *turns),
            value,
            attention_mask,
            packed_seq_params=borders,
            **given,
        )
        return out
