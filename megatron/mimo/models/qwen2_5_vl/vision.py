"""The vision encoder of Qwen2.5-VL, from its Hugging Face configuration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron.core.models.mimo.errors import UnsupportedError
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.mimo.encoders.qwen2_5_vl import (
    PatchMerger,
    WindowTransformer,
    window_encoder_config,
)
from megatron.mimo.encoders.qwen2_5_vl_attention import window_layer_spec
from megatron.mimo.encoders.qwen2_5_vl_geometry import PatchGeometry
from megatron.mimo.models.common.keys import Concatenated, FusedQKV, KeyEntry, Reshaped
from megatron.mimo.models.common.place import Place

__all__ = ["ENCODER", "patch_geometry", "patch_values", "vision_entries", "vision_specs"]

ENCODER = "qwen2_5_vl"
"""What the encoder is called."""

_IMAGES = "modality_submodules.images."


def vision_specs(vision: Any, language: TransformerConfig, place: Place) -> dict[str, Any]:
    """Encoder and projection, as the ``submodules`` of the modality's spec.

    Args:
        vision: the Hugging Face configuration (``Qwen2_5_VLVisionConfig``).
        language: Megatron's configuration of the language model.
        place: of the modality.

    Raises:
        ConfigError: sizes that do not fit each other or the tensor-parallel size.
        UnsupportedError: see :func:`patch_geometry`.
    """
    geometry = patch_geometry(vision)
    encoder_config = window_encoder_config(
        language,
        num_layers=vision.depth,
        hidden_size=vision.hidden_size,
        num_attention_heads=vision.num_heads,
        ffn_hidden_size=vision.intermediate_size,
    )
    encoder = ModuleSpec(
        module=WindowTransformer,
        params={
            "config": encoder_config,
            "transformer_layer_spec": window_layer_spec(
                encoder_config, full_layers=vision.fullatt_block_indexes
            ),
            "patch_values": patch_values(vision),
            "geometry": geometry,
            "pg_collection": place.groups,
        },
    )
    merger = ModuleSpec(
        module=PatchMerger,
        params={
            "config": encoder_config,
            "patches": geometry.merge**2,
            "output_size": language.hidden_size,
            "pg_collection": place.groups,
        },
    )
    return {"encoders": {ENCODER: encoder}, "input_projections": [merger]}


def patch_geometry(vision: Any) -> PatchGeometry:
    """What patches, squares and windows of a Hugging Face vision configuration are.

    Raises:
        ConfigError: sizes that cannot be.
        UnsupportedError: a setting that this encoder does not have.
    """
    for name, expected in (("hidden_act", "silu"), ("model_type", "qwen2_5_vl_vision")):
        if getattr(vision, name) != expected:
            raise UnsupportedError(
                f"vision_config.{name} is {getattr(vision, name)!r}; expected {expected!r}"
            )
    for name in ("patch_size", "temporal_patch_size"):
        if not isinstance(getattr(vision, name), int):
            raise UnsupportedError(
                f"vision_config.{name} is {getattr(vision, name)!r}; expected one number"
            )
    rope = vision.rope_parameters or {"rope_type": "axial", "rope_theta": 10_000.0}
    if rope["rope_type"] != "axial":
        raise UnsupportedError(
            f"vision_config's rope_type is {rope['rope_type']!r}; expected 'axial'"
        )
    return PatchGeometry(
        merge=vision.spatial_merge_size,
        window=vision.window_size // vision.spatial_merge_size // vision.patch_size,
        head_size=vision.hidden_size // vision.num_heads,
        theta=float(rope["rope_theta"]),
    )


def patch_values(vision: Any) -> int:
    """Values of a patch."""
    return math.prod(_patch_shape(vision))


def _patch_shape(vision: Any) -> tuple[int, int, int, int]:
    """Channels, frames, height and width."""
    size = vision.patch_size
    return (vision.in_channels, vision.temporal_patch_size, size, size)


def vision_entries(vision: Any) -> tuple[KeyEntry, ...]:
    """Parameter names of encoder and projection."""
    encoder, merger = f"{_IMAGES}encoders.{ENCODER}.", f"{_IMAGES}input_projections.0."
    ours, theirs = encoder + "transformer.layers.{i}.", "visual.blocks.{i}."
    qkv = JoinedQKV(heads=vision.num_heads, head_size=vision.hidden_size // vision.num_heads)
    convolution = (vision.hidden_size, *_patch_shape(vision))
    linear = Reshaped((vision.hidden_size, patch_values(vision)), convolution)

    def row(mimo: str, *hf: str, **given: Any) -> KeyEntry:
        names = tuple(theirs + name for name in hf)
        return KeyEntry(mimo=ours + mimo, hf=names, layers=range(vision.depth), **given)

    rows = [
        KeyEntry(
            mimo=encoder + "patch_embedding.weight",
            hf=("visual.patch_embed.proj.weight",),
            transform=linear,
        ),
        row("input_layernorm.weight", "norm1.weight"),
        row("pre_mlp_layernorm.weight", "norm2.weight"),
        KeyEntry(mimo=merger + "norm.weight", hf=("visual.merger.ln_q.weight",)),
    ]
    for kind in ("weight", "bias"):
        gate_up = (f"mlp.gate_proj.{kind}", f"mlp.up_proj.{kind}")
        rows += [
            row(f"self_attention.linear_qkv.{kind}", f"attn.qkv.{kind}", transform=qkv),
            row(f"self_attention.linear_proj.{kind}", f"attn.proj.{kind}"),
            row(f"mlp.linear_fc1.{kind}", *gate_up, transform=Concatenated(2)),
            row(f"mlp.linear_fc2.{kind}", f"mlp.down_proj.{kind}"),
            KeyEntry(mimo=f"{merger}mlp.linear_fc1.{kind}", hf=(f"visual.merger.mlp.0.{kind}",)),
            KeyEntry(mimo=f"{merger}mlp.linear_fc2.{kind}", hf=(f"visual.merger.mlp.2.{kind}",)),
        ]
    return tuple(rows)


@dataclass(frozen=True, kw_only=True)
class JoinedQKV:
    """One weight with all queries, then all keys, then all values, as Megatron fuses them.

    Attributes:
        heads: as many for queries as for keys.
        head_size: features of a head.
    """

    heads: int
    head_size: int

    def to_mimo(self, parts: Sequence[Tensor]) -> Tensor:
        """[3 * heads * head_size, ...], part by part -> head by head."""
        (tensor,) = parts
        return self._fused.to_mimo(tensor.chunk(3))

    def to_hf(self, tensor: Tensor) -> list[Tensor]:
        """The inverse."""
        return [torch.cat(self._fused.to_hf(tensor))]

    @property
    def _fused(self) -> FusedQKV:
        return FusedQKV(heads=self.heads, groups=self.heads, head_size=self.head_size)
