"""The vision towers of LLaVA-like models, CLIP's and SigLIP's, from their Hugging Face config."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from megatron.core.models.mimo.errors import UnsupportedError
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.mimo.data import MediaItem
from megatron.mimo.encoders import ClipEncoder, layer_numbers, plain_encoder_config
from megatron.mimo.layers import encoder_layer_spec
from megatron.mimo.models.common.keys import FusedQKV, KeyEntry, Reshaped
from megatron.mimo.models.common.place import Place

__all__ = [
    "image_items",
    "image_shape",
    "rows_per_image",
    "tower_carried",
    "tower_entries",
    "tower_name",
    "tower_spec",
]

_NAMES = {"clip_vision_model": "clip", "siglip_vision_model": "siglip"}
_KINDS = ("weight", "bias")
_LAYER = {
    "input_layernorm": "layer_norm1",
    "self_attention.linear_proj": "self_attn.out_proj",
    "pre_mlp_layernorm": "layer_norm2",
    "mlp.linear_fc1": "mlp.fc1",
    "mlp.linear_fc2": "mlp.fc2",
}


def tower_name(vision: Any) -> str:
    """What the encoder of a Hugging Face vision configuration is called: "clip" or "siglip".

    Raises:
        UnsupportedError: the configuration is of another kind.
    """
    if vision.model_type not in _NAMES:
        raise UnsupportedError(
            f"the vision tower's model_type is {vision.model_type!r}; expected one of "
            f"{', '.join(_NAMES)}"
        )
    return _NAMES[vision.model_type]


def image_shape(vision: Any) -> tuple[int, int, int]:
    """Channels, height and width of every image."""
    return (vision.num_channels, vision.image_size, vision.image_size)


def image_items(images: Iterable[Tensor], *, encoder: str, rows: int) -> tuple[MediaItem, ...]:
    """Images [C, height, width] of one conversation, each an item of so many rows."""
    return tuple(
        MediaItem(
            modality="images",
            encoder=encoder,
            inputs={"pixel_values": image_CHW.float()},
            rows=rows,
        )
        for image_CHW in images
    )


def rows_per_image(vision: Any, *, strategy: str) -> int:
    """Rows that an image gives; arguments as for :func:`tower_spec`."""
    patches: int = (vision.image_size // vision.patch_size) ** 2
    return patches + (tower_name(vision) == "clip") - _drops_first_row(strategy)


def tower_spec(
    vision: Any,
    language: TransformerConfig,
    place: Place,
    *,
    feature_layer: int | Sequence[int],
    strategy: str,
    post_norm: bool = False,
) -> ModuleSpec:
    """The encoder.

    Args:
        vision: its Hugging Face configuration (``CLIPVisionConfig``, ``SiglipVisionConfig``).
        language: Megatron's configuration of the language model.
        place: of the modality.
        feature_layer: LLaVA's ``vision_feature_layer``: one or several indices into the hidden
            states, the embedding first.
        strategy: LLaVA's ``vision_feature_select_strategy``: "default" leaves out the first row
            of an image (CLIP's class token), "full" keeps all.
        post_norm: features are the output of the last layer, normed.

    Raises:
        ConfigError: sizes or layers that do not fit.
        UnsupportedError: another kind of tower, activation or strategy.
    """
    is_clip = tower_name(vision) == "clip"
    layers = layer_numbers(feature_layer, vision.num_hidden_layers)
    config = plain_encoder_config(
        language,
        num_layers=max(layers),
        hidden_size=vision.hidden_size,
        num_attention_heads=vision.num_attention_heads,
        ffn_hidden_size=vision.intermediate_size,
        activation=vision.hidden_act,
        layernorm_epsilon=vision.layer_norm_eps,
        attention_dropout=vision.attention_dropout,
    )
    return ModuleSpec(
        module=ClipEncoder,
        params={
            "config": config,
            "transformer_layer_spec": encoder_layer_spec(config),
            "image_size": image_shape(vision)[1:],
            "patch_size": vision.patch_size,
            "channels": vision.num_channels,
            "class_token": is_clip,
            "pre_norm": is_clip,
            "patch_bias": not is_clip,
            "feature_layers": layers,
            "drop_first_row": _drops_first_row(strategy),
            "post_norm": post_norm,
            "pg_collection": place.groups,
        },
    )


def tower_entries(
    vision: Any,
    *,
    feature_layer: int | Sequence[int],
    mimo: str,
    hf: str,
    post_norm: bool = False,
) -> tuple[KeyEntry, ...]:
    """Parameter names of the encoder.

    Args:
        vision: its Hugging Face configuration.
        feature_layer: as for :func:`tower_spec`.
        mimo: our prefix, such as "modality_submodules.images.encoders.clip.".
        hf: Hugging Face's, such as "vision_tower.".
        post_norm: as for :func:`tower_spec`.
    """
    width, patch = vision.hidden_size, vision.patch_size
    qkv = FusedQKV(
        heads=vision.num_attention_heads,
        groups=vision.num_attention_heads,
        head_size=width // vision.num_attention_heads,
    )
    convolution = (width, vision.num_channels, patch, patch)
    linear = Reshaped((width, vision.num_channels * patch**2), convolution)

    def entry(ours: str, theirs: str, **given: Any) -> KeyEntry:
        return KeyEntry(mimo=mimo + ours, hf=(hf + theirs,), **given)

    entries = [
        entry("patch_embedding.weight", "embeddings.patch_embedding.weight", transform=linear),
        entry("position_embedding", "embeddings.position_embedding.weight"),
    ]
    if tower_name(vision) == "clip":
        entries.append(entry("class_embedding", "embeddings.class_embedding"))
        entries += [entry(f"pre_layernorm.{kind}", f"pre_layrnorm.{kind}") for kind in _KINDS]
    else:
        entries.append(entry("patch_embedding.bias", "embeddings.patch_embedding.bias"))
    if post_norm:
        norm = "transformer.final_layernorm"
        entries += [entry(f"{norm}.{kind}", f"post_layernorm.{kind}") for kind in _KINDS]
    layers = range(max(layer_numbers(feature_layer, vision.num_hidden_layers)))
    ours, theirs = "transformer.layers.{i}.", "encoder.layers.{i}."
    for kind in _KINDS:
        entries += [
            entry(f"{ours}{name}.{kind}", f"{theirs}{other}.{kind}", layers=layers)
            for name, other in _LAYER.items()
        ]
        entries.append(
            KeyEntry(
                mimo=f"{mimo}{ours}self_attention.linear_qkv.{kind}",
                hf=tuple(f"{hf}{theirs}self_attn.{name}_proj.{kind}" for name in "qkv"),
                transform=qkv,
                layers=layers,
            )
        )
    return tuple(entries)


def tower_carried(
    vision: Any, *, feature_layer: int | Sequence[int], hf: str, post_norm: bool = False
) -> tuple[str, ...]:
    """Patterns of the weights behind the features, which nothing is computed from."""
    built = max(layer_numbers(feature_layer, vision.num_hidden_layers))
    unused = [f"encoder.layers.{layer}.*" for layer in range(built, vision.num_hidden_layers)]
    # Files of older versions hold the numbers of the positions.
    unused += ["head.*", "embeddings.position_ids"]
    unused += [] if post_norm else ["post_layernorm.*"]
    return tuple(hf + pattern for pattern in unused)


def _drops_first_row(strategy: str) -> bool:
    if strategy not in ("default", "full"):
        raise UnsupportedError(
            f"vision_feature_select_strategy is {strategy!r}; expected 'default' or 'full'"
        )
    return strategy == "default"
