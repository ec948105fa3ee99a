"""The vision encoder of Qwen3-VL and Qwen3.5, from its Hugging Face configuration.

That of Qwen3.5 gives no levels of its rows.
"""

from __future__ import annotations

import math
from typing import Any

from megatron.core.models.mimo.errors import UnsupportedError
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.mimo.encoders.qwen2_5_vl import PatchMerger
from megatron.mimo.encoders.qwen2_5_vl_attention import frame_layer_spec
from megatron.mimo.encoders.qwen3_vl import FrameTransformer, frame_encoder_config
from megatron.mimo.encoders.qwen3_vl_geometry import FrameGeometry
from megatron.mimo.models.common.config_fields import Rule, field_rules
from megatron.mimo.models.common.keys import JoinedQKV, KeyEntry, Reshaped
from megatron.mimo.models.common.place import Place
from megatron.mimo.models.common.visuals import check_patches, patch_shape, patch_values

__all__ = [
    "ENCODER",
    "frame_geometry",
    "frame_rules",
    "level_layers",
    "vision_entries",
    "vision_specs",
]

ENCODER = "qwen3_vl"
"""What the encoder is called."""

_ACTIVATION = "gelu_pytorch_tanh"
_IMAGES = "modality_submodules.images."


def frame_rules(*more: str) -> dict[str, Rule]:
    """What becomes of the fields of its configuration; ``more`` are those that Qwen3.5's lacks."""
    return field_rules(
        "depth hidden_size hidden_act intermediate_size num_heads in_channels patch_size "
        "spatial_merge_size temporal_patch_size out_hidden_size num_position_embeddings "
        "rope_parameters " + " ".join(more)
    )


def vision_specs(vision: Any, language: TransformerConfig, place: Place) -> dict[str, Any]:
    """Encoder, projection and those of the levels, as the ``submodules`` of the modality's spec.

    Args:
        vision: the Hugging Face configuration (``Qwen3VLVisionConfig``, ``Qwen3_5VisionConfig``).
        language: Megatron's configuration of the language model.
        place: of the modality.

    Raises:
        ConfigError: sizes that do not fit each other or the tensor-parallel size.
        UnsupportedError: see :func:`frame_geometry`.
    """
    geometry, layers = frame_geometry(vision), level_layers(vision)
    encoder_config = frame_encoder_config(
        language,
        num_layers=vision.depth,
        hidden_size=vision.hidden_size,
        num_attention_heads=vision.num_heads,
        ffn_hidden_size=vision.intermediate_size,
        activation=_ACTIVATION,
    )
    encoder = ModuleSpec(
        module=FrameTransformer,
        params={
            "config": encoder_config,
            "transformer_layer_spec": frame_layer_spec(encoder_config),
            "patch_values": patch_values(vision),
            "geometry": geometry,
            "level_layers": layers,
            "pg_collection": place.groups,
        },
    )

    def merger(norm_of: str) -> ModuleSpec:
        return ModuleSpec(
            module=PatchMerger,
            params={
                "config": encoder_config,
                "patches": geometry.merge**2,
                "output_size": language.hidden_size,
                "norm_of": norm_of,
                "pg_collection": place.groups,
            },
        )

    return {
        "encoders": {ENCODER: encoder},
        "input_projections": [merger("patches")],
        "level_projections": [merger("square") for _ in layers],
    }


def level_layers(vision: Any) -> list[int]:
    """The layers that give levels of the rows; Qwen3.5 has none."""
    return list(getattr(vision, "deepstack_visual_indexes", ()))


def frame_geometry(vision: Any) -> FrameGeometry:
    """What patches, squares and positions of a Hugging Face vision configuration are.

    Raises:
        ConfigError: sizes that cannot be.
        UnsupportedError: a setting that this encoder does not have.
    """
    theta = check_patches(vision, activation=_ACTIVATION)
    side = math.isqrt(vision.num_position_embeddings)
    if side**2 != vision.num_position_embeddings:
        raise UnsupportedError(
            f"vision_config.num_position_embeddings is {vision.num_position_embeddings}; expected "
            "a square number: positions are learned on a square grid"
        )
    return FrameGeometry(
        merge=vision.spatial_merge_size,
        head_size=vision.hidden_size // vision.num_heads,
        theta=theta,
        side=side,
    )


def vision_entries(vision: Any) -> tuple[KeyEntry, ...]:
    """Parameter names of encoder, projection and those of the levels."""
    encoder, theirs = f"{_IMAGES}encoders.{ENCODER}.", "model.visual."
    qkv = JoinedQKV(heads=vision.num_heads, head_size=vision.hidden_size // vision.num_heads)
    convolution = (vision.hidden_size, *patch_shape(vision))
    linear = Reshaped((vision.hidden_size, patch_values(vision)), convolution)

    def layer(mimo: str, hf: str, **given: Any) -> KeyEntry:
        return KeyEntry(
            mimo=f"{encoder}transformer.layers.{{i}}.{mimo}",
            hf=(f"{theirs}blocks.{{i}}.{hf}",),
            layers=range(vision.depth),
            **given,
        )

    def merger(mimo: str, hf: str, kind: str, layers: range | None = None) -> list[KeyEntry]:
        names = (
            ("norm", "norm"),
            ("mlp.linear_fc1", "linear_fc1"),
            ("mlp.linear_fc2", "linear_fc2"),
        )
        return [
            KeyEntry(
                mimo=f"{_IMAGES}{mimo}.{ours}.{kind}",
                hf=(f"{theirs}{hf}.{name}.{kind}",),
                layers=layers,
            )
            for ours, name in names
        ]

    entries = [
        KeyEntry(
            mimo=encoder + "patch_embedding.weight",
            hf=(theirs + "patch_embed.proj.weight",),
            transform=linear,
        ),
        KeyEntry(mimo=encoder + "patch_embedding.bias", hf=(theirs + "patch_embed.proj.bias",)),
        KeyEntry(mimo=encoder + "position_embedding", hf=(theirs + "pos_embed.weight",)),
    ]
    levels = range(len(level_layers(vision)))
    for kind in ("weight", "bias"):
        entries += [
            layer(f"input_layernorm.{kind}", f"norm1.{kind}"),
            layer(f"pre_mlp_layernorm.{kind}", f"norm2.{kind}"),
            layer(f"self_attention.linear_qkv.{kind}", f"attn.qkv.{kind}", transform=qkv),
            layer(f"self_attention.linear_proj.{kind}", f"attn.proj.{kind}"),
            layer(f"mlp.linear_fc1.{kind}", f"mlp.linear_fc1.{kind}"),
            layer(f"mlp.linear_fc2.{kind}", f"mlp.linear_fc2.{kind}"),
            *merger("input_projections.0", "merger", kind),
            *(merger("level_projections.{i}", "deepstack_merger_list.{i}", kind, levels)),
        ]
    return tuple(entries)
