"""Attention of the Qwen-VL encoders: rotated by line and column, within windows or frames.

Legend: T patches of all items, H heads of this tensor-parallel rank, D head size.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

from torch import Tensor

from megatron.core.models.mimo.errors import InputError
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.mimo.encoders.patch_grids import TurnedSequence
from megatron.mimo.encoders.qwen2_5_vl_geometry import PatchSequence
from megatron.mimo.layers import encoder_layer_spec
from megatron.mimo.layers.fused import rotate

__all__ = ["TurningAttention", "WindowAttention", "frame_layer_spec", "window_layer_spec"]


def window_layer_spec(config: TransformerConfig, *, full_layers: Collection[int]) -> ModuleSpec:
    """Layers of the encoder, without the norm after the last.

    Args:
        config: of the encoder.
        full_layers: numbers, from 0, of layers whose attention spans a frame; that of the others
            spans a window.

    Raises:
        ConfigError: see :func:`encoder_layer_spec`.
    """
    return _layer_spec(config, partial(WindowAttention, full_layers=frozenset(full_layers)))


def frame_layer_spec(config: TransformerConfig) -> ModuleSpec:
    """The same, where the attention of all layers spans a frame."""
    return _layer_spec(config, TurningAttention)


def _layer_spec(config: TransformerConfig, turning: Any) -> ModuleSpec:
    block = encoder_layer_spec(config)
    block.submodules.layer_norm = None
    for layer in {id(one): one for one in block.submodules.layer_specs}.values():
        attention = layer.submodules.self_attention.submodules
        attention.core_attention = partial(turning, inner=attention.core_attention)
    return block


class TurningAttention(MegatronModule):
    """Rotates queries and keys, then attends within frames; takes the place of ``core_attention``.

    Packed sequences have to be a ``TurnedSequence``.

    Args:
        config: of the encoder.
        layer_number: from 1.
        attn_mask_type: passed on.
        attention_type: passed on.
        inner: builds the attention that does the work.
        given: passed on.
    """

    sequence: type[TurnedSequence] = TurnedSequence

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        *,
        inner: Any,
        **given: Any,
    ) -> None:
        super().__init__(config=config)
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
            InputError: ``packed_seq_params`` are no such sequence.
        """
        if not isinstance(packed_seq_params, self.sequence):
            raise InputError(
                f"packed_seq_params are {type(packed_seq_params).__name__}; expected a "
                f"{self.sequence.__name__}: this attention is a vision encoder's alone"
            )
        query, key = rotate(query, key, packed_seq_params.turns_TD)
        out: Tensor = self.inner(
            query,
            key,
            value,
            attention_mask,
            packed_seq_params=self.borders(packed_seq_params),
            **given,
        )
        return out

    def borders(self, sequence: Any) -> PackedSeqParams:
        """Where the pieces that attend to themselves begin and end."""
        whole: PackedSeqParams = sequence
        return whole


class WindowAttention(TurningAttention):
    """As ``TurningAttention``, for a ``PatchSequence``: within windows, in most layers.

    Args:
        full_layers: see :func:`window_layer_spec`.
        layer_number: from 1.
        given: those of ``TurningAttention``.
    """

    sequence = PatchSequence

    def __init__(self, *, full_layers: frozenset[int], layer_number: int, **given: Any) -> None:
        super().__init__(layer_number=layer_number, **given)
        self.is_full = layer_number - 1 in full_layers

    def borders(self, sequence: PatchSequence) -> PackedSeqParams:
        """Of frames in full layers, else of windows."""
        return sequence if self.is_full else sequence.windows
