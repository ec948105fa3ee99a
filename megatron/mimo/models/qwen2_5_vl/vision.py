"""The vision encoder of Qwen2.5-VL, from its Hugging Face configuration."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.mimo.encoders.qwen2_5_vl import (
    PatchMerger,
    WindowTransformer,
    window_encoder_config,
)
from megatron.mimo.encoders.qwen2_5_vl_attention import window_layer_spec
from megatron.mimo.encoders.qwen2_5_vl_geometry import PatchGeometry
from megatron.mimo.models.common.config_fields import field_rules
from megatron.mimo.models.common.keys import Concatenated, JoinedQKV, KeyEntry, Reshaped
from megatron.mimo.models.common.place import Place
from megatron.mimo.models.common.visuals import check_patches, patch_shape, patch_values

__all__ = ["ENCODER", "VISION_RULES", "patch_geometry", "vision_entries", "vision_specs"]

ENCODER = "qwen2_5_vl"
"""What the encoder is called."""

VISION_RULES = field_rules(
    "depth hidden_size hidden_act intermediate_size num_heads in_channels patch_size "
    "spatial_merge_size temporal_patch_size tokens_per_second window_size out_hidden_size "
    "fullatt_block_indexes rope_parameters"
)
"""What becomes of the fields of its configuration."""

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
    theta = check_patches(vision, activation="silu")
    return PatchGeometry(
        merge=vision.spatial_merge_size,
        window=vision.window_size // vision.spatial_merge_size // vision.patch_size,
        head_size=vision.hidden_size // vision.num_heads,
        theta=theta,
    )


def vision_entries(vision: Any) -> tuple[KeyEntry, ...]:
    """Parameter names of encoder and projection."""
    encoder, merger = f"{_IMAGES}encoders.{ENCODER}.", f"{_IMAGES}input_projections.0."
    ours, theirs = encoder + "transformer.layers.{i}.", "visual.blocks.{i}."
    qkv = JoinedQKV(heads=vision.num_heads, head_size=vision.hidden_size // vision.num_heads)
    convolution = (vision.hidden_size, *patch_shape(vision))
    linear = Reshaped((vision.hidden_size, patch_values(vision)), convolution)

    def entry(mimo: str, *hf: str, **given: Any) -> KeyEntry:
        names = tuple(theirs + name for name in hf)
        return KeyEntry(mimo=ours + mimo, hf=names, layers=range(vision.depth), **given)

    entries = [
        KeyEntry(
            mimo=encoder + "patch_embedding.weight",
            hf=("visual.patch_embed.proj.weight",),
            transform=linear,
        ),
        entry("input_layernorm.weight", "norm1.weight"),
        entry("pre_mlp_layernorm.weight", "norm2.weight"),
        KeyEntry(mimo=merger + "norm.weight", hf=("visual.merger.ln_q.weight",)),
    ]
    for kind in ("weight", "bias"):
        gate_up = (f"mlp.gate_proj.{kind}", f"mlp.up_proj.{kind}")
        entries += [
            entry(f"self_attention.linear_qkv.{kind}", f"attn.qkv.{kind}", transform=qkv),
            entry(f"self_attention.linear_proj.{kind}", f"attn.proj.{kind}"),
            entry(f"mlp.linear_fc1.{kind}", *gate_up, transform=Concatenated(2)),
            entry(f"mlp.linear_fc2.{kind}", f"mlp.down_proj.{kind}"),
            KeyEntry(mimo=f"{merger}mlp.linear_fc1.{kind}", hf=(f"visual.merger.mlp.0.{kind}",)),
            KeyEntry(mimo=f"{merger}mlp.linear_fc2.{kind}", hf=(f"visual.merger.mlp.2.{kind}",)),
        ]
    return tuple(entries)
