"""InternViT and the pixel shuffle of InternVL, from its Hugging Face configuration."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from megatron.core.models.mimo.errors import UnsupportedError
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.mimo.encoders import ClipEncoder, SquareProjector, layer_numbers, plain_encoder_config
from megatron.mimo.encoders.internvit import internvit_layer_spec
from megatron.mimo.models.common.config_fields import field_rules
from megatron.mimo.models.common.keys import FusedQKV, KeyEntry, Reshaped, Same, Transform
from megatron.mimo.models.common.place import Place

__all__ = [
    "ENCODER",
    "VISION_RULES",
    "check_tiles",
    "rows_per_tile",
    "tile_shape",
    "vision_carried",
    "vision_entries",
    "vision_specs",
]

ENCODER = "internvit"
"""What the encoder is called."""

VISION_RULES = field_rules(
    "hidden_size intermediate_size num_hidden_layers num_attention_heads num_channels image_size "
    "patch_size hidden_act layer_norm_eps attention_dropout attention_bias use_qk_norm norm_type "
    "use_mask_token use_mean_pooling",
    aside="layer_scale_init_value",
    only={
        "hidden_dropout_prob": (0, None),
        "projection_dropout": (0, None),
        "use_absolute_position_embeddings": (True,),
    },
)
"""What becomes of the fields of its configuration."""

_IMAGES = "modality_submodules.images."
_KINDS = ("weight", "bias")
_SAME = Same()
_PROJECTOR_EPSILON = 1e-5
_NORMALIZATIONS: dict[str, Literal["LayerNorm", "RMSNorm"]] = {
    "layer_norm": "LayerNorm",
    "rms_norm": "RMSNorm",
}


def tile_shape(vision: Any) -> tuple[int, int, int]:
    """Channels, height and width of every tile."""
    height, width = vision.image_size
    return (vision.num_channels, height, width)


def rows_per_tile(config: Any) -> int:
    """Rows that the language model gets of a tile."""
    return (_side(config.vision_config) // _shuffle(config)) ** 2


def check_tiles(config: Any) -> None:
    """Refuse sizes and feature layers from which no rows can be made.

    Raises:
        UnsupportedError: names the field.
    """
    vision = config.vision_config
    if vision.norm_type not in ("layer_norm", "rms_norm"):
        raise UnsupportedError(
            f"config.json: vision_config.norm_type is {vision.norm_type!r}; expected 'layer_norm' "
            "or 'rms_norm'"
        )
    for name in ("image_size", "patch_size"):
        sides = list(getattr(vision, name))
        if len(sides) != 2 or sides[0] != sides[1]:
            raise UnsupportedError(
                f"config.json: vision_config.{name} is {sides}; expected two equal numbers"
            )
    side = _side(vision)
    if side % _shuffle(config):
        raise UnsupportedError(
            f"config.json: downsample_ratio is {config.downsample_ratio}, and vision_config's "
            f"image_size and patch_size make {side} x {side} patches; expected a number of patches "
            f"that squares of {_shuffle(config)} x {_shuffle(config)} fill"
        )
    if not isinstance(config.vision_feature_layer, int):
        raise UnsupportedError(
            f"config.json: vision_feature_layer is {config.vision_feature_layer}; expected one "
            "number"
        )
    if _has_post_norm(config) and vision.norm_type != "layer_norm":
        raise UnsupportedError(
            f"config.json: vision_config.use_mean_pooling is False, with norm_type "
            f"{vision.norm_type!r}; expected True, or 'layer_norm', which the norm behind the last "
            "layer always is"
        )


def _side(vision: Any) -> int:
    """Patches along the side of a tile."""
    side: int = vision.image_size[0] // vision.patch_size[0]
    return side


def _shuffle(config: Any) -> int:
    """Patches along the side of the squares that become a row each."""
    ratio = config.downsample_ratio
    side = round(1 / ratio) if ratio > 0 else 0
    if side < 1 or side * ratio != 1:
        raise UnsupportedError(
            f"config.json: downsample_ratio is {ratio}; expected one divided by a whole number"
        )
    return side


def vision_specs(config: Any, language: TransformerConfig, place: Place) -> dict[str, Any]:
    """Encoder and projection, as the ``submodules`` of the modality's spec.

    Args:
        config: the Hugging Face configuration of the whole model.
        language: Megatron's configuration of the language model.
        place: of the modality.

    Raises:
        ConfigError: sizes that do not fit each other or the tensor-parallel size.
        UnsupportedError: unknown activation.
    """
    vision = config.vision_config
    numbers = layer_numbers(config.vision_feature_layer, vision.num_hidden_layers)
    encoder_config = plain_encoder_config(
        language,
        num_layers=max(numbers),
        hidden_size=vision.hidden_size,
        num_attention_heads=vision.num_attention_heads,
        ffn_hidden_size=vision.intermediate_size,
        activation=vision.hidden_act,
        normalization=_NORMALIZATIONS[vision.norm_type],
        layernorm_epsilon=vision.layer_norm_eps,
        attention_dropout=vision.attention_dropout,
    )
    encoder = ModuleSpec(
        module=ClipEncoder,
        params={
            "config": encoder_config,
            "transformer_layer_spec": internvit_layer_spec(
                encoder_config,
                initial_scale=vision.layer_scale_init_value,
                qkv_bias=vision.attention_bias,
                qk_norm=vision.use_qk_norm,
                tp_group=place.groups.tp,
            ),
            "image_size": tile_shape(vision)[1:],
            "patch_size": vision.patch_size[0],
            "channels": vision.num_channels,
            "class_token": True,
            "pre_norm": False,
            "patch_bias": True,
            "feature_layers": numbers,
            "drop_first_row": True,
            "post_norm": _has_post_norm(config),
            "pg_collection": place.groups,
        },
    )
    projector = ModuleSpec(
        module=SquareProjector,
        params={
            "config": language,
            "grid": (_side(vision), _side(vision)),
            "side": _shuffle(config),
            "input_size": vision.hidden_size,
            "output_size": language.hidden_size,
            "norm": "squares",
            "layernorm_epsilon": _PROJECTOR_EPSILON,
            "activation": config.projector_hidden_act,
            "pg_collection": place.groups,
        },
    )
    return {"encoders": {ENCODER: encoder}, "input_projections": [projector]}


def _has_post_norm(config: Any) -> bool:
    """Whether features are normed: only those of the last layer, and only without pooling."""
    return config.vision_feature_layer == -1 and not config.vision_config.use_mean_pooling


def vision_entries(config: Any) -> tuple[KeyEntry, ...]:
    """Parameter names of encoder and projection."""
    encoder, projector = f"{_IMAGES}encoders.{ENCODER}.", f"{_IMAGES}input_projections.0."
    whole = [
        (f"{projector}norm", "multi_modal_projector.layer_norm"),
        (f"{projector}projector.linear_fc1", "multi_modal_projector.linear_1"),
        (f"{projector}projector.linear_fc2", "multi_modal_projector.linear_2"),
    ]
    if _has_post_norm(config):
        whole.append((f"{encoder}transformer.final_layernorm", "vision_tower.layernorm"))
    return (
        *_embedding_entries(config.vision_config, encoder),
        *_layer_entries(config, f"{encoder}transformer.layers.{{i}}."),
        *(
            KeyEntry(mimo=f"{ours}.{kind}", hf=(f"{theirs}.{kind}",))
            for ours, theirs in whole
            for kind in _KINDS
        ),
    )


def _embedding_entries(vision: Any, mimo: str) -> Iterator[KeyEntry]:
    """Of patches, their positions and the class token."""
    width, patch, positions = vision.hidden_size, vision.patch_size[0], _side(vision) ** 2 + 1

    def entry(ours: str, theirs: str, transform: Transform) -> KeyEntry:
        hf = (f"vision_tower.embeddings.{theirs}",)
        return KeyEntry(mimo=mimo + ours, hf=hf, transform=transform)

    yield entry("class_embedding", "cls_token", Reshaped((width,), (1, 1, width)))
    shapes = (positions, width), (1, positions, width)
    yield entry("position_embedding", "position_embeddings", Reshaped(*shapes))
    values = vision.num_channels * patch**2
    linear = Reshaped((width, values), (width, vision.num_channels, patch, patch))
    yield entry("patch_embedding.weight", "patch_embeddings.projection.weight", linear)
    yield entry("patch_embedding.bias", "patch_embeddings.projection.bias", _SAME)


def _layer_entries(config: Any, mimo: str) -> Iterator[KeyEntry]:
    """Of every layer that is built."""
    vision = config.vision_config
    layers = range(max(layer_numbers(config.vision_feature_layer, vision.num_hidden_layers)))
    heads = vision.num_attention_heads
    qkv = FusedQKV(heads=heads, groups=heads, head_size=vision.hidden_size // heads)

    def entry(ours: str, *theirs: str, transform: Transform = _SAME) -> KeyEntry:
        hf = tuple(f"vision_tower.encoder.layer.{{i}}.{name}" for name in theirs)
        return KeyEntry(mimo=mimo + ours, hf=hf, layers=layers, transform=transform)

    for kind in _KINDS if vision.norm_type == "layer_norm" else ("weight",):
        yield entry(f"input_layernorm.{kind}", f"layernorm_before.{kind}")
        yield entry(f"pre_mlp_layernorm.{kind}", f"layernorm_after.{kind}")
    for kind in _KINDS if vision.attention_bias else ("weight",):
        names = (f"attention.{name}_proj.{kind}" for name in "qkv")
        yield entry(f"self_attention.linear_qkv.{kind}", *names, transform=qkv)
    for kind in _KINDS:
        yield entry(f"self_attention.linear_proj.{kind}", f"attention.projection_layer.{kind}")
        yield entry(f"mlp.linear_fc1.{kind}", f"mlp.fc1.{kind}")
        yield entry(f"mlp.linear_fc2.{kind}", f"mlp.fc2.{kind}")
    for name in "qk" if vision.use_qk_norm else "":
        ours = f"self_attention.core_attention.{name}_norm.weight"
        yield entry(ours, f"attention.{name}_norm.weight")
    yield entry("self_attn_bda.scale", "lambda_1")
    yield entry("mlp_bda.scale", "lambda_2")


def vision_carried(config: Any) -> tuple[str, ...]:
    """Patterns of the weights behind the features, and of the mask token, which nothing reads."""
    vision = config.vision_config
    built = max(layer_numbers(config.vision_feature_layer, vision.num_hidden_layers))
    unused = [f"encoder.layer.{layer}.*" for layer in range(built, vision.num_hidden_layers)]
    unused += ["embeddings.mask_token"] if vision.use_mask_token else []
    if not vision.use_mean_pooling and not _has_post_norm(config):
        unused.append("layernorm.*")
    return tuple(f"vision_tower.{pattern}" for pattern in unused)
