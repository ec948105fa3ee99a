"""Whisper's audio encoder from Megatron's parts, and Qwen2-Audio's variant of it.

Both are a convolutional stem that halves the frame rate, sinusoidal positions and a transformer
with pre-norm layers. Whisper attends to the whole window, silence included. Qwen2-Audio attends to
the frames of the clip only, averages pairs of them and normalises after that.

Shape legend: N clips, M mel bins, F frames of a clip as given, P positions (a clip's frames after
the stem), T packed positions of all clips, H hidden.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron.core.models.mimo.errors import ConfigError, InputError
from megatron.core.models.mimo.partition.packing import packed_params
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.mimo.encoders.vit import check_runs_whole
from megatron.mimo.encoders.work import EncoderWork
from megatron.mimo.layers import Norm, borders_on_host

__all__ = ["WhisperEncoder", "frames_needed", "sinusoids", "stem_length"]

_STRIDE = 2  # of the stem


def stem_length(frames: int) -> int:
    """Positions that the stem makes of so many frames."""
    return (frames + 1) // _STRIDE


def frames_needed(length: int, window: int) -> int:
    """Frames that decide the positions of a clip of ``length`` frames: two more, by the kernels."""
    return min(length + 2, window)


def sinusoids(positions: int, width: int) -> Tensor:
    """Sines and cosines [positions, width] of wavelengths from 2 pi to 2 pi * 10000.

    Raises:
        ConfigError: ``width`` is odd or below 4.
    """
    if width < 4 or width % 2:
        raise ConfigError(f"sinusoidal positions of width {width}; expected an even width from 4")
    step = math.log(10_000) / (width // 2 - 1)
    frequencies = torch.exp(-step * torch.arange(width // 2))
    angles = torch.arange(positions)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class WhisperEncoder(MegatronModule):
    """Log-mel spectrograms to rows of features, one or half a row per two frames.

    Clips of one length run as a batch, others packed in one row: no position is padding.

    Queries and values have biases and keys have none, which would cancel in the softmax: the part
    of the fused bias that belongs to keys is zero and gets a gradient of zero, so that no optimizer
    moves it.

    Args:
        config: of the encoder, see :func:`plain_encoder_config`.
        transformer_layer_spec: of one layer whose attention has no mask.
        num_mel_bins: M.
        max_positions: positions of the window; it has twice as many frames.
        attends_to_silence: frames behind a clip's length are attended to, as Whisper does. Without,
            all but the clip's own positions are left out.
        pooling: positions that are averaged into one row: 1, or 2 as Qwen2-Audio does.
        pg_collection: Megatron's process groups; the global ones by default.

    Raises:
        ConfigError: sizes that are not positive; a split config.
    """

    position_embedding: Tensor

    def __init__(
        self,
        config: TransformerConfig,
        transformer_layer_spec: ModuleSpec,
        *,
        num_mel_bins: int,
        max_positions: int,
        attends_to_silence: bool = True,
        pooling: int = 1,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        if min(num_mel_bins, max_positions, pooling) < 1:
            raise ConfigError(
                f"num_mel_bins={num_mel_bins}, max_positions={max_positions}, pooling={pooling}; "
                "expected positive numbers"
            )
        check_runs_whole(config)
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups()
        self.tp_group = pg_collection.tp
        self.num_mel_bins = num_mel_bins
        self.window = max_positions * _STRIDE
        self.attends_to_silence = attends_to_silence
        self.pooling = pooling
        hidden = config.hidden_size
        # All but the transformer is replicated over the tensor-parallel group: Megatron seeds the
        # default generator equally there, and equal inputs give equal gradients.
        self.conv1 = nn.Conv1d(num_mel_bins, hidden, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(hidden, hidden, kernel_size=3, stride=_STRIDE, padding=1)
        # Not trained, and in checkpoints all the same: published ones are rounded.
        self.register_buffer("position_embedding", sinusoids(max_positions, hidden))
        self.transformer = TransformerBlock(
            config=config,
            spec=transformer_layer_spec,
            post_layer_norm=False,  # behind the pooling instead
            pg_collection=pg_collection,
        )
        self.final_layernorm = Norm(config, hidden)
        for layer in self.transformer.layers:
            _hold_key_bias(layer.self_attention.linear_qkv.bias, config.kv_channels)

    def blank_inputs(self) -> dict[str, Any]:
        """Arguments of ``forward`` for the shortest clip that gives a row.

        A micro-batch without this modality runs it, so that every rank takes part in collectives.
        """
        frames = _STRIDE * self.pooling
        return {
            "input_features": [self.position_embedding.new_zeros(self.num_mel_bins, frames)],
            "lengths": [frames],
        }

    def packed_sequences(self, length: int) -> int:
        """Rows that a clip of ``length`` frames gives."""
        return stem_length(length) // self.pooling

    def rows_per_item(
        self, input_features: Tensor | Sequence[Tensor], lengths: Sequence[int] | None = None
    ) -> list[int]:
        """Rows of each clip."""
        return [self.packed_sequences(length) for length in _lengths(input_features, lengths)]

    def work(
        self, input_features: Tensor | Sequence[Tensor], lengths: Sequence[int] | None = None
    ) -> EncoderWork:
        """How often the parts run for these clips."""
        frames = [clip_MF.size(-1) for clip_MF in input_features]
        seen = frames if self.attends_to_silence else _lengths(input_features, lengths)
        positions = [stem_length(length) for length in seen]
        return EncoderWork(
            vectors={
                "conv1": sum(frames),
                "conv2": sum(stem_length(length) for length in frames),
                "transformer": sum(positions),
            },
            pairs={"transformer": sum(length**2 for length in positions)},
            rows=sum(self.rows_per_item(input_features, lengths)),
        )

    def forward(
        self, input_features: Tensor | Sequence[Tensor], lengths: Sequence[int] | None = None
    ) -> Tensor:
        """Encode clips.

        A Whisper that was trained on whole windows wants whole windows (F = 2 * max_positions).
        Where silence is not attended to, frames from :func:`frames_needed` on change nothing.

        Args:
            input_features: [N, M, F] or N tensors [M, F] with an F of their own, of any floating
                dtype; N may be 0.
            lengths: frames of each clip that are no silence, on the host; F by default.

        Returns:
            [sum of :meth:`packed_sequences`, H], clip by clip.

        Raises:
            InputError: features or lengths that do not fit the encoder or each other.
        """
        numbers = _lengths(input_features, lengths)
        self._check(input_features, numbers)
        if not numbers:
            # Megatron's attention does not take an empty batch. A blank clip, whose rows are
            # dropped, gives every parameter a gradient of zero instead of none, so that this rank
            # takes part in the reductions that others enter.
            return self.forward(**self.blank_inputs())[:0]
        clips = self._embed(input_features)
        kept = [stem_length(length) for length in numbers]
        attended = [len(clip_PH) for clip_PH in clips] if self.attends_to_silence else kept
        clips = [clip_PH[:count] for clip_PH, count in zip(clips, attended, strict=True)]
        encoded = self._transform(clips, attended)
        rows = [
            _average(clip_PH[:count], self.pooling)
            for clip_PH, count in zip(encoded, kept, strict=True)
        ]
        normed_NH: Tensor = self.final_layernorm(torch.cat(rows))
        return normed_NH

    def _embed(self, features: Tensor | Sequence[Tensor]) -> list[Tensor]:
        """Each clip's positions [P, H]; clips with the same number of frames go together."""
        by_size: dict[int, list[int]] = {}
        for number, clip_MF in enumerate(features):
            by_size.setdefault(clip_MF.size(1), []).append(number)
        embedded: dict[int, Tensor] = {}
        for numbers in by_size.values():
            if isinstance(features, Tensor) and len(numbers) == len(features):
                clips_NMF = features
            else:
                clips_NMF = torch.stack([features[number] for number in numbers])
            hidden_NHF = F.gelu(self.conv1(clips_NMF.to(self.conv1.weight.dtype)))
            hidden_NHP = F.gelu(self.conv2(hidden_NHF))
            positions_PH = self.position_embedding[: hidden_NHP.size(2)]
            embedded |= dict(zip(numbers, hidden_NHP.transpose(1, 2) + positions_PH, strict=True))
        return [embedded[number] for number in range(len(embedded))]

    def _transform(self, clips: list[Tensor], lengths: list[int]) -> Sequence[Tensor]:
        """The layers' output [P, H] for each clip."""
        if len(set(lengths)) == 1:
            hidden_PNH = self.transformer(torch.stack(clips, dim=1), attention_mask=None)
            return hidden_PNH.unbind(1)
        hidden_T1H = torch.cat(clips)[:, None]
        packed = packed_params(
            {"cu_seqlens_q": [0, *accumulate(lengths)]},
            device=None if borders_on_host(self.config, hidden_T1H) else hidden_T1H.device,
        )
        hidden_T1H = self.transformer(hidden_T1H, attention_mask=None, packed_seq_params=packed)
        return hidden_T1H[:, 0].split(lengths)

    def _check(self, features: Tensor | Sequence[Tensor], lengths: Sequence[int]) -> None:
        if len(features) != len(lengths):
            raise InputError(
                f"{len(features)} clips and {len(lengths)} lengths; expected one for each"
            )
        for number, (clip, length) in enumerate(zip(features, lengths, strict=True)):
            fits = clip.dim() == 2 and clip.size(0) == self.num_mel_bins
            if not fits or not clip.is_floating_point() or not 0 < clip.size(1) <= self.window:
                raise InputError(
                    f"clip {number} is {clip.dtype} {list(clip.shape)}; expected floating point "
                    f"[{self.num_mel_bins}, 1 to {self.window}] (mel bins, frames)"
                )
            if self.packed_sequences(length) < 1 or length > clip.size(1):
                raise InputError(
                    f"clip {number} has length {length} and {clip.size(1)} frames; expected a "
                    f"length of {_STRIDE * self.pooling - 1} to {clip.size(1)}"
                )


def _lengths(features: Tensor | Sequence[Tensor], lengths: Sequence[int] | None) -> Sequence[int]:
    return [clip_MF.size(-1) for clip_MF in features] if lengths is None else lengths


def _average(positions_PH: Tensor, count: int) -> Tensor:
    """Means of ``count`` neighbours; what is left at the end is dropped."""
    if count == 1:
        return positions_PH
    rows = len(positions_PH) // count
    return positions_PH[: rows * count].unflatten(0, (rows, count)).mean(dim=1)


def _hold_key_bias(bias: nn.Parameter, head_size: int) -> None:
    """Keep the keys' part of a fused bias where it is: zero at the start, without a gradient."""
    with torch.no_grad():
        bias.view(-1, 3, head_size)[:, 1] = 0.0
    is_kept: list[Tensor] = []

    def without_keys(gradient: Tensor) -> Tensor:
        if not is_kept or is_kept[0].device != gradient.device:
            kept = torch.ones_like(gradient)
            kept.view(-1, 3, head_size)[:, 1] = 0.0
            is_kept[:] = [kept]
        return gradient * is_kept[0]

    bias.register_hook(without_keys)
