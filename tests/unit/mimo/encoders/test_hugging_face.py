"""Encoders of transformers inside the wrapper: what they give, what is trained, what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModel,
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    ResNetConfig,
    SiglipVisionConfig,
    WhisperConfig,
    WhisperModel,
)

from megatron.core.models.mimo.errors import ConfigError, InputError, UnsupportedError
from megatron.mimo.encoders import HuggingFaceEncoder

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 8,
    "patch_size": 4,
}
DINO = Dinov2Config(**SIZES, hidden_dropout_prob=0.5)
SIGLIP = SiglipVisionConfig(**SIZES, intermediate_size=48)
RESNET = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_channels=3)
WHISPER = WhisperConfig(
    num_mel_bins=6,
    encoder_layers=2,
    encoder_attention_heads=4,
    encoder_ffn_dim=48,
    d_model=32,
    max_source_positions=10,
    decoder_layers=1,
    decoder_ffn_dim=8,
    decoder_attention_heads=4,
    vocab_size=16,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=1,
)
IMAGE = {"pixel_values": torch.zeros(1, 3, 8, 8)}


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def encode(config: Any, **settings: Any) -> tuple[HuggingFaceEncoder, Tensor, Any]:
    """The encoder, its rows of two images, and all outputs of the model for these."""
    encoder = HuggingFaceEncoder(config, blank=IMAGE, **settings)
    encoder.eval()
    everything = encoder.model(images(), output_hidden_states=True)
    return encoder, encoder(pixel_values=images()), everything


def test_features() -> None:
    encoder, rows, everything = encode(DINO, drop_first=1)
    torch.testing.assert_close(rows, everything.last_hidden_state[:, 1:].flatten(0, 1))
    assert encoder.rows_per_item(pixel_values=images()) == [4, 4]
    encoder, rows, everything = encode(DINO, feature=-2)
    torch.testing.assert_close(rows, everything.hidden_states[-2].flatten(0, 1))
    assert encoder.rows_per_item(pixel_values=images()) == [5, 5]
    encoder, rows, everything = encode(SIGLIP, feature="pooler_output")
    torch.testing.assert_close(rows, everything.pooler_output)
    assert encoder.rows_per_item(pixel_values=images()) == [1, 1]
    _, rows, everything = encode(SIGLIP, feature=lambda out: out.last_hidden_state[:, ::2])
    torch.testing.assert_close(rows, everything.last_hidden_state[:, ::2].flatten(0, 1))
    _, rows, everything = encode(RESNET, frozen=True)
    first = everything.last_hidden_state[0]
    torch.testing.assert_close(rows[0], first[:, 0, 0])
    assert len(rows) == 2 * first[0].numel()


def test_rows_of_a_function_keep_the_front_of_each_item() -> None:
    encoder = HuggingFaceEncoder(
        WHISPER,
        model_class=WhisperModel,
        part="encoder",
        blank={"input_features": torch.zeros(1, 6, 20), "lengths": [2]},
        rows=lambda input_features, lengths: [length // 2 for length in lengths],
    ).eval()
    clips = torch.randn(3, 6, 20)
    rows = encoder(input_features=clips, lengths=[20, 6, 2])
    whole = encoder.model(clips).last_hidden_state
    torch.testing.assert_close(rows, torch.cat([whole[0], whole[1, :3], whole[2, :1]]))
    assert encoder(input_features=clips[:0], lengths=[]).shape == (0, 32)
    with pytest.raises(InputError, match=r"rows gives \[11, 1, 1\] for 3 items of 10 positions"):
        encoder(input_features=clips, lengths=[22, 2, 2])


def test_what_nothing_depends_on_is_not_trained() -> None:
    encoder, rows, _ = encode(DINO, feature=-2, drop_first=1)
    encoder.zero_grad()
    rows.square().sum().backward()
    trained = {name for name, p in encoder.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in encoder.named_parameters() if p.grad is not None}
    idle = {name for name, _ in encoder.named_parameters()} - trained
    assert "model.embeddings.mask_token" in idle
    assert "model.layernorm.weight" in idle
    assert any("layer.2." in name for name in idle)
    assert not any("layer.1." in name for name in idle)


def test_no_items_give_no_rows_and_zero_gradients() -> None:
    encoder = HuggingFaceEncoder(DINO, blank=IMAGE)
    rows = encoder(pixel_values=images(0))
    assert rows.shape == (0, 32)
    rows.sum().backward()
    for parameter in encoder.parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            assert not parameter.grad.any()


def test_frozen_stays_in_evaluation_mode() -> None:
    frozen = HuggingFaceEncoder(DINO, blank=IMAGE, frozen=True)
    outer = torch.nn.ModuleList([frozen]).train()
    assert not any(module.training for module in frozen.modules())
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    rows = frozen(pixel_values=images())
    assert not rows.requires_grad
    torch.testing.assert_close(rows, frozen(pixel_values=images()))  # dropout is 0.5
    frozen.requires_grad_()
    outer.train()
    assert all(module.training for module in frozen.modules())
    frozen.requires_grad_(False)  # as MimoModel.freeze does
    outer.train()
    assert not frozen.model.training


def test_weights_of_a_directory(tmp_path: Path) -> None:
    AutoModel.from_config(DINO).save_pretrained(tmp_path)
    encoder, rows, _ = encode(tmp_path, frozen=True, dtype=torch.bfloat16)
    assert rows.dtype == torch.bfloat16
    _, expected, _ = encode(tmp_path)
    torch.testing.assert_close(rows.float(), expected, rtol=0.1, atol=0.1)
    saved = AutoModel.from_pretrained(tmp_path).state_dict()
    for name, tensor in encoder.model.state_dict().items():
        assert torch.equal(tensor, saved[name].bfloat16())
    with torch.device("meta"):  # names and shapes alone
        hollow = HuggingFaceEncoder(tmp_path, blank=IMAGE)
    assert {n: p.shape for n, p in hollow.named_parameters()} == {
        n: p.shape for n, p in encoder.named_parameters()
    }


def test_a_part_of_what_is_in_a_directory(tmp_path: Path) -> None:
    vision = {**SIZES, "intermediate_size": 48}
    text = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    whole = CLIPModel(CLIPConfig(vision_config=vision, text_config=text))
    whole.save_pretrained(tmp_path)
    _, rows, _ = encode(tmp_path, part="vision_model", drop_first=1)
    expected = whole.vision_model.eval()(images()).last_hidden_state[:, 1:]
    torch.testing.assert_close(rows, expected.flatten(0, 1))


class Turning(torch.nn.Module):
    """What a rotary embedding keeps: computed frequencies beside saved statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("inv_freq", torch.tensor([1.001]), persistent=False)
        self.register_buffer("mean", torch.tensor([1.001]))


def test_computed_buffers_keep_their_precision() -> None:
    encoder = HuggingFaceEncoder(DINO, blank=IMAGE)
    encoder.model.add_module("turning", Turning())
    torch.nn.ModuleList([encoder]).bfloat16()
    turning: Any = encoder.model.turning
    assert turning.inv_freq.item() == pytest.approx(1.001, abs=1e-6)
    assert turning.mean.dtype == torch.bfloat16
    assert encoder(pixel_values=images()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"feature": "pooled"}, r"feature 'pooled' of Dinov2Model is not there; .*pooler_output"),
        ({"feature": 4}, "feature 4 of Dinov2Model is not there; it has 4 hidden states"),
        ({"drop_first": 5}, "no rows with drop_first=5"),
        ({"drop_first": -1}, "drop_first is -1"),
        ({"part": "tower"}, "Dinov2Model has no part 'tower'"),
        ({"blank": {"pixel_values": torch.zeros(2, 3, 8, 8)}}, "one item along dimension 0"),
        ({"blank": {}}, "expected at least one"),
        ({"blank": {"pixels": IMAGE["pixel_values"]}}, r"Dinov2Model refuses .*\['pixel_values'"),
        ({"blank": {"pixel_values": torch.zeros(1, 5, 8, 8)}}, r"refuses .*\[1, 5, 8, 8\]}: "),
        ({"feature": lambda output: output.pooler_output[0]}, r"has shape \[32\]"),
    ],
)
def test_refusals(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        HuggingFaceEncoder(DINO, **({"blank": IMAGE} | settings))


def test_norms_over_the_batch_are_not_trained() -> None:
    with pytest.raises(UnsupportedError, match=r"is a BatchNorm2d, .* use frozen=True"):
        HuggingFaceEncoder(RESNET, blank=IMAGE)


def test_inputs_that_are_not_known() -> None:
    encoder = HuggingFaceEncoder(DINO, blank=IMAGE)
    with pytest.raises(InputError, match=r"got \['pixels'\]; expected \['pixel_values'\]"):
        encoder(pixels=images())


def test_directories_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"/none: there is no such folder"):
        HuggingFaceEncoder(tmp_path / "none", blank=IMAGE)
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        HuggingFaceEncoder(tmp_path, blank=IMAGE)
    AutoModel.from_config(SIGLIP).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(ConfigError, match="cannot be read"):
        HuggingFaceEncoder(tmp_path, blank=IMAGE)
    WhisperModel(WHISPER).save_pretrained(tmp_path)
    clip = {"input_features": torch.zeros(1, 6, 20)}
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    with pytest.raises(ConfigError, match=r"weights of WhisperEncoder.* which would be random"):
        HuggingFaceEncoder(tmp_path, blank=clip, model_class=WhisperEncoder)


def test_the_example_of_the_documentation() -> None:
    page = (Path(__file__).parents[4] / "docs" / "encoders.md").read_text()
    [code] = [block for block in re.findall(r"```python\n(.*?)```", page, re.S) if "Dino" in block]
    names: dict[str, Any] = {}
    exec(code, names)
    images = names["images"].module.from_spec(names["images"])
    assert images.encoders["dino"].rows_of_blank == 256
    rows = images({"dino": {"pixel_values": torch.randn(2, 3, 224, 224)}})
    assert rows.shape == (2 * 256, 128)
