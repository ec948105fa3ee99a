"""The audio encoders against transformers' with the same weights, on one rank and under TP.

Shape legend: M mel bins, F frames, H hidden.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.core.models.mimo.errors import InputError, UnsupportedError
from tests.unit.mimo.encoders.test_vit import language_config

MELS, HIDDEN, POSITIONS = 6, 32, 20
WINDOW = 2 * POSITIONS
# Odd and even numbers of frames and of positions; a whole window, and one that nearly is.
LENGTHS = (WINDOW, 17, 3, 18, WINDOW - 1, 30)
KINDS = ["whisper", "qwen2_audio"]
SIZES: dict[str, Any] = {
    "num_mel_bins": MELS,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "d_model": HIDDEN,
    "max_source_positions": POSITIONS,
}


def hugging_face(kind: str) -> tuple[Any, Any]:
    """Configuration and encoder of transformers, the latter with weights far from zero."""
    from transformers import Qwen2AudioEncoder, Qwen2AudioEncoderConfig, WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config: Any = Qwen2AudioEncoderConfig(**SIZES)
    encoder: Any = Qwen2AudioEncoder(config)
    if kind == "whisper":
        config = WhisperConfig(**SIZES)
        encoder = WhisperEncoder(config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in sorted(encoder.named_parameters()):
            noise = 0.3 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise + ("norm.weight" in name))
    return config, encoder.float()


def clips(lengths: tuple[int, ...] = LENGTHS) -> Tensor:
    """[N, M, F]; silence is not zero in a log-mel spectrogram."""
    generator = torch.Generator().manual_seed(5)
    features_NMF = torch.randn(len(lengths), MELS, WINDOW, generator=generator)
    for clip_MF, length in zip(features_NMF, lengths, strict=True):
        clip_MF[:, length:] = -0.7
    return features_NMF


def row_weights(count: int) -> Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(6))


def reference(kind: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Rows of each clip, encoded alone, and the gradient of every parameter."""
    _, encoder = hugging_face(kind)
    rows = []
    for clip_MF, length in zip(clips(), LENGTHS, strict=True):
        if kind == "whisper":
            features = encoder(clip_MF[None]).last_hidden_state
            count = (length + 1) // 2
        else:
            positions, count = (
                int(size) for size in encoder._get_feat_extract_output_lengths(torch.tensor(length))
            )
            hidden_P = torch.arange(POSITIONS) >= positions
            mask_PP = torch.zeros(1, 1, POSITIONS, POSITIONS).masked_fill(hidden_P, -torch.inf)
            features = encoder(clip_MF[None], attention_mask=mask_PP).last_hidden_state
        rows.append(features[0, :count])
    rows_NH = torch.cat(rows)
    (rows_NH * row_weights(len(rows_NH))).sum().backward()
    return rows_NH.detach(), {n: p.grad for n, p in encoder.named_parameters()}


def build(kind: str, groups: Any, **settings: Any) -> tuple[Any, Any]:
    """The encoder with the reference's weights, and the table of their names."""
    from megatron.core.transformer.spec_utils import build_module
    from megatron.mimo.models.common.audio_tower import audio_entries, audio_spec
    from megatron.mimo.models.common.place import Place

    config, encoder = hugging_face(kind)
    place = Place(groups=groups)
    language = language_config(tensor_model_parallel_size=groups.tp.size(), **settings)
    built = build_module(audio_spec(config, language, place))
    rows = [one for row in audio_entries(config, mimo="", hf="") for one in row.each()]
    weights = dict(encoder.named_parameters())
    with torch.no_grad():
        for name, shard in built.sharded_state_dict().items():
            if torch.is_tensor(getattr(shard, "data", None)):
                [row] = [row for row in rows if row.mimo == name]
                whole = row.transform.to_mimo([weights[key] for key in row.hf])
                shard.data.copy_(own_part(whole, shard))
    return built, rows


def own_part(whole: Tensor, shard: Any) -> Tensor:
    offsets = shard.global_offset[shard.prepend_axis_num :]
    for axis, (offset, size) in enumerate(zip(offsets, shard.local_shape, strict=True)):
        whole = whole.narrow(axis, offset, size)
    return whole


def run_ours(kind: str, tp: int) -> dict[str, Any]:
    """Rows, and this rank's gradients beside its parts of the reference's."""
    from megatron.mimo.encoders.whisper import frames_needed
    from tests.rank_pool import model_parallel

    encoder, rows = build(kind, model_parallel(tp=tp))
    features: Any = clips()
    if kind == "qwen2_audio":  # nothing that is not needed
        features = [
            clip_MF[:, : frames_needed(length, WINDOW)]
            for clip_MF, length in zip(features, LENGTHS, strict=True)
        ]
    rows_NH = encoder(features, list(LENGTHS))
    (rows_NH * row_weights(len(rows_NH))).sum().backward()
    _, expected = reference(kind)
    pairs = {}
    owners = {parameter.data_ptr(): parameter for parameter in encoder.parameters()}
    for name, shard in encoder.sharded_state_dict().items():
        if not torch.is_tensor(getattr(shard, "data", None)) or name == "position_embedding":
            continue
        [row] = [row for row in rows if row.mimo == name]
        whole = row.transform.to_mimo([expected[key] for key in row.hf])
        pairs[name] = (owners[shard.data.data_ptr()].grad, own_part(whole, shard))
    return {
        "rows": rows_NH.detach(),
        "rows_per_item": encoder.rows_per_item(features, list(LENGTHS)),
        "grads": pairs,
        "all parameters": len(pairs) == len(owners),
    }


@pytest.mark.parametrize(("kind", "tp"), [("whisper", 1), ("qwen2_audio", 1), ("qwen2_audio", 2)])
def test_equals_transformers(ranks: Any, kind: str, tp: int) -> None:
    expected_NH, _ = reference(kind)
    for result in ranks(tp)(run_ours, kind, tp):
        assert sum(result["rows_per_item"]) == len(expected_NH)
        torch.testing.assert_close(result["rows"], expected_NH, rtol=0, atol=1e-4)
        assert result["all parameters"]
        for name, (grad, expected) in result["grads"].items():
            error = (grad - expected).norm() / expected.norm()
            assert error < 1e-3, (name, float(error))


def alone_and_together() -> dict[str, Any]:
    """A packed call against one call per clip, and what the ends of a batch give."""
    from tests.rank_pool import model_parallel

    groups = model_parallel()
    results: dict[str, Any] = {}
    for kind in KINDS:
        encoder, _ = build(kind, groups)
        together_NH = encoder(
            [clip_MF[:, : n + 1] for clip_MF, n in zip(clips(), LENGTHS, strict=True)]
        )
        alone = [
            encoder(clip_MF[None, :, : n + 1]) for clip_MF, n in zip(clips(), LENGTHS, strict=True)
        ]
        results[kind] = together_NH, torch.cat(alone)
        encoder.zero_grad()
        none = encoder([], [])
        none.sum().backward()
        results[f"{kind}, no clips"] = (
            tuple(none.shape),
            all(p.grad is not None and not p.grad.any() for p in encoder.parameters()),
        )
        blank = encoder.blank_inputs()
        results[f"{kind}, blank"] = len(encoder(**blank)), encoder.rows_per_item(**blank)
        results[f"{kind}, bf16"] = encoder.bfloat16()(clips()).dtype
    return results


def test_clips_do_not_see_each_other_and_there_may_be_none(ranks: Any) -> None:
    [results] = ranks(1)(alone_and_together)
    for kind in KINDS:
        torch.testing.assert_close(*results[kind], rtol=0, atol=1e-5)
        assert results[f"{kind}, no clips"] == ((0, HIDDEN), True)
        assert results[f"{kind}, blank"] == (1, [1])
        assert results[f"{kind}, bf16"] == torch.bfloat16


def train_briefly() -> dict[str, Tensor]:
    """Biases and outputs after steps of Adam, which makes any gradient a full step."""
    from tests.rank_pool import model_parallel

    encoder, _ = build("qwen2_audio", model_parallel())
    encoder = encoder.double().float()  # what a precision wrapper does to parameters
    optimizer = torch.optim.Adam(encoder.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        rows_NH = encoder(clips(), list(LENGTHS))
        (rows_NH * row_weights(len(rows_NH))).sum().backward()
        optimizer.step()
    bias = encoder.transformer.layers[1].self_attention.linear_qkv.bias.detach()
    return dict(zip("qkv", bias.view(4, 3, -1).unbind(1), strict=True))


def test_the_bias_of_keys_that_nobody_has_stays_zero(ranks: Any) -> None:
    [biases] = ranks(1)(train_briefly)
    assert not biases["k"].any()
    assert biases["q"].abs().min() > 0
    assert biases["v"].abs().min() > 0


def refusals() -> dict[str, str]:
    from tests.rank_pool import model_parallel

    groups = model_parallel()
    encoder, _ = build("qwen2_audio", groups)

    def told(error: type[Exception], use: Any) -> str:
        try:
            use()
        except error as caught:
            return str(caught)
        return "nothing"

    config, _ = hugging_face("whisper")
    config.dropout = 0.1
    return {
        "frames": told(InputError, lambda: encoder([torch.zeros(MELS, WINDOW + 1)])),
        "mels": told(InputError, lambda: encoder(torch.zeros(1, MELS + 1, 8))),
        "short": told(InputError, lambda: encoder(torch.zeros(1, MELS, 8), [2])),
        "long": told(InputError, lambda: encoder(torch.zeros(1, MELS, 8), [9])),
        "number": told(InputError, lambda: encoder(torch.zeros(2, MELS, 8), [8])),
        "dropout": told(UnsupportedError, lambda: spec_of(config, groups)),
        "kind": told(UnsupportedError, lambda: spec_of(language_config(), groups)),
    }


def spec_of(config: Any, groups: Any) -> Any:
    from megatron.mimo.models.common.audio_tower import audio_spec
    from megatron.mimo.models.common.place import Place

    if not hasattr(config, "model_type"):
        config.model_type = "wav2vec2"
    place = Place(groups=groups)
    return audio_spec(config, language_config(), place)


def test_refusals(ranks: Any) -> None:
    [told] = ranks(1)(refusals)
    assert "clip 0 is torch.float32 [6, 41]; expected floating point [6, 1 to 40]" in told["frames"]
    assert "[7, 8]" in told["mels"]
    assert "clip 0 has length 2 and 8 frames; expected a length of 3 to 8" in told["short"]
    assert "clip 0 has length 9" in told["long"]
    assert "2 clips and 1 lengths" in told["number"]
    assert "dropout is 0.1; expected 0" in told["dropout"]
    assert "'wav2vec2'; expected one of whisper, qwen2_audio_encoder" in told["kind"]


def test_positions_are_those_of_whisper() -> None:
    from transformers.models.whisper.modeling_whisper import sinusoids as expected

    from megatron.mimo.encoders.whisper import sinusoids

    torch.testing.assert_close(sinusoids(50, 16), expected(50, 16), rtol=0, atol=1e-6)
