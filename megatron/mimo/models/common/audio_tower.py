"""The audio towers of Whisper and Qwen2-Audio, from their Hugging Face configuration, and what
models with such a tower have in common.

Shape legend: M mel bins, F frames.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megatron.core.models.mimo import AudioModalitySubmodules
from megatron.core.models.mimo.errors import InputError, UnsupportedError
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.mimo.data import MediaFormat, MediaItem
from megatron.mimo.encoders import Projector, WhisperEncoder, plain_encoder_config
from megatron.mimo.encoders.whisper import frames_needed, stem_length
from megatron.mimo.layers import encoder_layer_spec
from megatron.mimo.models.common.keys import FusedQKV, KeyEntry
from megatron.mimo.models.common.place import Place

__all__ = [
    "AUDIO",
    "ENCODER",
    "TINY_AUDIO",
    "TOWER",
    "audio_entries",
    "audio_format",
    "audio_items",
    "audio_modality",
    "audio_spec",
    "example_audio",
    "rows_of_clip",
]

AUDIO = "modality_submodules.audio."  # where the modality is in the model
ENCODER = "whisper"  # what the encoder is called
TOWER = f"{AUDIO}encoders.{ENCODER}."  # where it is in the model
TINY_AUDIO: dict[str, Any] = {
    "num_mel_bins": 16,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "d_model": 32,
    "max_source_positions": 30,
}

# Whether silence is attended to, and how many positions make a row.
_KINDS = {"whisper": (True, 1), "qwen2_audio_encoder": (False, 2)}
_DROPOUTS = ("dropout", "activation_dropout", "encoder_layerdrop")


def audio_modality(
    audio: Any, language: TransformerConfig, place: Place, **projector: Any
) -> ModuleSpec:
    """The modality: the encoder and a projector.

    Args:
        audio: the encoder's Hugging Face configuration.
        language: Megatron's configuration of the language model.
        place: of the modality.
        projector: further arguments of :class:`Projector`.

    Raises:
        ConfigError, UnsupportedError: see :func:`audio_spec` and :class:`Projector`.
    """
    projection = ModuleSpec(
        module=Projector,
        params={
            "config": language,
            "input_size": audio.d_model,
            "output_size": language.hidden_size,
            "pg_collection": place.groups,
            **projector,
        },
    )
    return ModuleSpec(
        module=AudioModalitySubmodules,
        submodules={
            "encoders": {ENCODER: audio_spec(audio, language, place)},
            "input_projections": [projection],
        },
    )


def audio_spec(audio: Any, language: TransformerConfig, place: Place) -> ModuleSpec:
    """The encoder.

    Args:
        audio: its Hugging Face configuration (``WhisperConfig``, ``Qwen2AudioEncoderConfig``).
        language: Megatron's configuration of the language model.
        place: of the modality.

    Raises:
        ConfigError: sizes that do not fit.
        UnsupportedError: another kind of tower or activation, or dropout outside of attention.
    """
    attends_to_silence, pooling = _kind(audio)
    for name in _DROPOUTS:
        if getattr(audio, name):
            raise UnsupportedError(
                f"the audio tower's {name} is {getattr(audio, name)}; expected 0"
            )
    config = plain_encoder_config(
        language,
        num_layers=audio.encoder_layers,
        hidden_size=audio.d_model,
        num_attention_heads=audio.encoder_attention_heads,
        ffn_hidden_size=audio.encoder_ffn_dim,
        activation=audio.activation_function,
        layernorm_epsilon=1e-5,
        attention_dropout=audio.attention_dropout,
    )
    return ModuleSpec(
        module=WhisperEncoder,
        params={
            "config": config,
            "transformer_layer_spec": encoder_layer_spec(config),
            "num_mel_bins": audio.num_mel_bins,
            "max_positions": audio.max_source_positions,
            "attends_to_silence": attends_to_silence,
            "pooling": pooling,
            "pg_collection": place.groups,
        },
    )


def audio_entries(audio: Any, *, mimo: str, hf: str) -> tuple[KeyEntry, ...]:
    """Parameter names of the encoder.

    Args:
        audio: its Hugging Face configuration.
        mimo: our prefix, such as "modality_submodules.audio.encoders.whisper.".
        hf: Hugging Face's, such as "audio_tower.".
    """
    layers = range(audio.encoder_layers)
    heads = audio.encoder_attention_heads
    ours, theirs = mimo + "transformer.layers.{i}.", hf + "layers.{i}."
    entries = [KeyEntry(mimo=mimo + "position_embedding", hf=(hf + "embed_positions.weight",))]
    for kind in ("weight", "bias"):
        entries += [
            KeyEntry(mimo=f"{mimo}{name}.{kind}", hf=(f"{hf}{other}.{kind}",))
            for name, other in _OUTSIDE.items()
        ]
        entries += [
            KeyEntry(mimo=f"{ours}{name}.{kind}", hf=(f"{theirs}{other}.{kind}",), layers=layers)
            for name, other in _LAYER.items()
        ]
        missing = ("k",) if kind == "bias" else ()
        entries.append(
            KeyEntry(
                mimo=f"{ours}self_attention.linear_qkv.{kind}",
                hf=tuple(
                    f"{theirs}self_attn.{name}_proj.{kind}" for name in "qkv" if name not in missing
                ),
                transform=FusedQKV(
                    heads=heads, groups=heads, head_size=audio.d_model // heads, missing=missing
                ),
                layers=layers,
            )
        )
    return tuple(entries)


_OUTSIDE = {"conv1": "conv1", "conv2": "conv2", "final_layernorm": "layer_norm"}
_LAYER = {
    "input_layernorm": "self_attn_layer_norm",
    "self_attention.linear_proj": "self_attn.out_proj",
    "pre_mlp_layernorm": "final_layer_norm",
    "mlp.linear_fc1": "fc1",
    "mlp.linear_fc2": "fc2",
}


def rows_of_clip(audio: Any, length: int) -> int:
    """Rows that a clip of ``length`` frames gives."""
    return stem_length(length) // _kind(audio)[1]


def audio_format(audio: Any) -> MediaFormat:
    """A clip: as many frames as matter, and how many of them are no silence."""
    return MediaFormat(
        encoder=ENCODER,
        inputs={
            "input_features": (torch.float32, (audio.num_mel_bins, None)),
            "lengths": (torch.int64, ()),
        },
        on_host=("lengths",),
    )


def audio_items(
    audio: Any, features: Mapping[str, Tensor], *, modality: str, name: str
) -> tuple[MediaItem, ...]:
    """The clips of one conversation.

    Args:
        audio: Hugging Face configuration of the encoder.
        features: ``input_features`` [clips, M, F], padded to the encoder's window, and
            ``feature_attention_mask`` [clips, F], 1 in front for frames that are no silence; or
            neither.
        modality: of the items.
        name: of the sample, for errors.

    Raises:
        InputError: one without the other, or shapes or a mask of another kind.
    """
    given = {key: features.get(key) for key in ("input_features", "feature_attention_mask")}
    clips_NMF, mask_NF = given.values()
    if clips_NMF is None and mask_NF is None:
        return ()
    if clips_NMF is None or mask_NF is None:
        missing = next(key for key, value in given.items() if value is None)
        raise InputError(f"sample {name}: {missing} is missing; give both or neither of {[*given]}")
    window = 2 * audio.max_source_positions
    expected = [len(clips_NMF), audio.num_mel_bins, window]
    if [*clips_NMF.shape] != expected or [*mask_NF.shape] != [expected[0], window]:
        raise InputError(
            f"sample {name}: input_features {[*clips_NMF.shape]} and feature_attention_mask "
            f"{[*mask_NF.shape]}; expected {expected} and {[expected[0], window]}: let the feature "
            "extractor pad to its whole window"
        )
    attends_to_silence, pooling = _kind(audio)
    items = []
    for number, (clip_MF, mask_F) in enumerate(zip(clips_NMF, mask_NF, strict=True)):
        length = int(mask_F.sum())
        if length < 2 * pooling - 1 or not bool(mask_F[:length].all()):
            raise InputError(
                f"sample {name}, clip {number}: feature_attention_mask has {length} frames that "
                f"are no silence; expected at least {2 * pooling - 1}, silence behind them all"
            )
        frames = window if attends_to_silence else frames_needed(length, window)
        items.append(
            MediaItem(
                modality=modality,
                encoder=ENCODER,
                inputs={
                    "input_features": clip_MF[:, :frames].float().clone(),
                    "lengths": torch.tensor(length),
                },
                rows=rows_of_clip(audio, length),
            )
        )
    return tuple(items)


def example_audio(audio: Any, count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """So many random clips of random lengths, as :func:`audio_items` takes them."""
    window = 2 * audio.max_source_positions
    lengths_N = torch.randint(3, window + 1, (count,), generator=generator)
    return {
        "input_features": torch.randn(count, audio.num_mel_bins, window, generator=generator),
        "feature_attention_mask": (torch.arange(window) < lengths_N[:, None]).long(),
    }


def _kind(audio: Any) -> tuple[bool, int]:
    if audio.model_type not in _KINDS:
        raise UnsupportedError(
            f"the audio tower's model_type is {audio.model_type!r}; expected one of "
            f"{', '.join(_KINDS)}"
        )
    return _KINDS[audio.model_type]
