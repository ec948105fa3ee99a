"""CLIP's and SigLIP's encoders against those of transformers, with the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.core.models.mimo.errors import ConfigError, InputError, UnsupportedError
from tests.distributed.models.ranks import gradient_errors
from tests.rank_pool import RankPool, model_parallel

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 24,
    "patch_size": 8,
}
FEATURES, GRADIENTS = 1e-4, 1e-3


def vision_config(kind: str, **changes: Any) -> Any:
    import transformers

    name = {"clip": "CLIPVisionConfig", "siglip": "SiglipVisionConfig"}[kind]
    return getattr(transformers, name)(**(SIZES | changes))


def language_config(**changes: Any) -> Any:
    """Of a LLaMA, none of whose architecture may reach the encoder."""
    from torch.nn import functional as F

    from megatron.core.transformer.transformer_config import TransformerConfig

    settings: dict[str, Any] = {
        "num_layers": 5,
        "hidden_size": 48,
        "num_attention_heads": 6,
        "num_query_groups": 2,
        "normalization": "RMSNorm",
        "layernorm_epsilon": 1e-3,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "bias_activation_fusion": True,
        "add_bias_linear": False,
        "hidden_dropout": 0.1,
        "attention_dropout": 0.1,
        "use_cpu_initialization": True,
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
    }
    return TransformerConfig(**(settings | changes))


def build(vision: Any, groups: Any, **how: Any) -> Any:
    from megatron.core.transformer.spec_utils import build_module
    from megatron.mimo.models.common.place import Place
    from megatron.mimo.models.common.vision_tower import tower_spec

    place = Place(groups=groups)
    language = language_config(tensor_model_parallel_size=groups.tp.size())
    how = {"feature_layer": -2, "strategy": "default"} | how
    return build_module(tower_spec(vision, language, place, **how))


def random_images(count: int) -> Tensor:
    return torch.randn(count, 3, 24, 24, generator=torch.Generator().manual_seed(3))


def compare(
    kind: str, how: dict[str, Any], tp: int, **sizes: int
) -> tuple[float, dict[str, float], int]:
    """On each rank: distance of features, errors of gradients, layers that are built."""
    import transformers

    from megatron.mimo.checkpoints.weights import load_hugging_face
    from megatron.mimo.models.common.keys import KeyTable
    from megatron.mimo.models.common.vision_tower import tower_carried, tower_entries

    groups = model_parallel(tp=tp)
    vision = vision_config(kind, **sizes)
    torch.manual_seed(0)
    reference = transformers.AutoModel.from_config(vision)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter) + (parameter.mean() > 0.9))
    pixels = random_images(3)
    states = reference(pixels, output_hidden_states=True).hidden_states
    layers = how["feature_layer"]
    chosen = [states[layer] for layer in ([layers] if isinstance(layers, int) else layers)]
    expected = torch.cat(chosen, dim=-1)
    expected = expected[:, 1:] if how["strategy"] == "default" else expected
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(4))
    (expected * weights).sum().backward()

    encoder = build(vision, groups, **how)
    table = KeyTable(
        entries=tower_entries(vision, feature_layer=layers, mimo="", hf=""),
        carried=tower_carried(vision, feature_layer=layers, hf=""),
    )
    load_hugging_face(encoder, reference.state_dict(), table)
    rows = encoder(pixels)
    assert rows.shape == (expected[..., 0].numel(), expected.size(-1))
    assert encoder.rows_per_item(pixels) == [expected.size(1)] * 3
    (rows * weights.flatten(0, 1)).sum().backward()
    gradients = {
        name: parameter.grad
        for name, parameter in reference.named_parameters()
        if parameter.grad is not None
    }
    distance = (rows.detach() - expected.flatten(0, 1).detach()).abs().max().item()
    errors = gradient_errors(encoder, table, gradients)
    return distance, errors, len(encoder.transformer.layers)


@pytest.mark.slow
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize(
    ("kind", "feature_layer", "strategy", "layers"),
    [
        ("clip", -2, "default", 3),
        ("clip", [-4, 2, 0, -2], "full", 3),
        ("siglip", -1, "full", 4),
        ("siglip", [1, -1], "default", 4),
    ],
    ids=["clip", "clip-several-layers", "siglip", "siglip-first-row-dropped"],
)
def test_equals_transformers(
    ranks: RankPool, kind: str, feature_layer: Any, strategy: str, layers: int, tp: int
) -> None:
    how = {"feature_layer": feature_layer, "strategy": strategy}
    for distance, errors, built in ranks(tp)(compare, kind, how, tp):
        assert built == layers
        assert distance < FEATURES
        assert all(error < GRADIENTS for error in errors.values()), errors


def test_a_border_narrower_than_a_patch_is_not_seen(ranks: RankPool) -> None:
    how = {"feature_layer": -1, "strategy": "full"}
    ((distance, errors, _),) = ranks(1)(compare, "siglip", how, 1, patch_size=7)
    assert distance < FEATURES
    assert all(error < GRADIENTS for error in errors.values()), errors


def last_hidden_state() -> float:
    """Distance from SigLIP's last hidden state, which is normalised."""
    import transformers

    from megatron.mimo.checkpoints.weights import load_hugging_face
    from megatron.mimo.encoders import ClipEncoder
    from megatron.mimo.layers import encoder_layer_spec
    from megatron.mimo.models.common.keys import KeyEntry, KeyTable
    from megatron.mimo.models.common.vision_tower import tower_entries

    groups = model_parallel()
    vision = vision_config("siglip", vision_use_head=False)
    reference = transformers.AutoModel.from_config(vision)
    plain = build(vision, groups, feature_layer=-1, strategy="full")
    encoder = ClipEncoder(
        plain.config,
        encoder_layer_spec(plain.config),
        image_size=(24, 24),
        patch_size=8,
        class_token=False,
        pre_norm=False,
        patch_bias=True,
        drop_first_row=False,
        post_norm=True,
        pg_collection=groups,
    )
    norm = tuple(
        KeyEntry(mimo=f"transformer.final_layernorm.{kind}", hf=(f"post_layernorm.{kind}",))
        for kind in ("weight", "bias")
    )
    rows = tower_entries(vision, feature_layer=-1, mimo="", hf="")
    weights = {
        name: tensor + 0.1 * torch.randn_like(tensor)
        for name, tensor in reference.state_dict().items()
    }
    reference.load_state_dict(weights)
    load_hugging_face(encoder, weights, KeyTable(entries=(*rows, *norm)))
    pixels = random_images(2)
    expected = reference(pixels).last_hidden_state.flatten(0, 1)
    return (encoder(pixels) - expected).abs().max().item()


def test_the_norm_behind_the_last_layer(ranks: RankPool) -> None:
    assert ranks(1)(last_hidden_state)[0] < FEATURES


def lists_and_nothing(tp: int) -> None:
    encoder = build(vision_config("clip"), model_parallel(tp=tp))
    pixels = random_images(3)
    items = [pixels[:2], pixels[2:], pixels[:0]]
    assert encoder.rows_per_item(items) == [18, 9, 0]
    torch.testing.assert_close(encoder(items), encoder(pixels))
    assert encoder(**encoder.blank_inputs()).shape == (9, 32)
    assert encoder(pixels[:0]).shape == (0, 32)
    rows = encoder([])
    assert rows.shape == (0, 32)
    rows.sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name
    assert encoder.bfloat16()(pixels).dtype == torch.bfloat16


@pytest.mark.parametrize("tp", [1, 2])
def test_items_of_several_images_and_no_images(ranks: RankPool, tp: int) -> None:
    ranks(tp)(lists_and_nothing, tp)


def refusals() -> None:
    groups = model_parallel()
    for layers, message in (
        (5, "expected indices from -5 to 4"),
        (-6, "expected indices from -5 to 4"),
        (0, "one of them behind a layer"),
        ([], "one of them behind a layer"),
    ):
        with pytest.raises(ConfigError, match=message):
            build(vision_config("clip"), groups, feature_layer=layers)
    with pytest.raises(UnsupportedError, match="strategy is 'cls'; expected 'default' or 'full'"):
        build(vision_config("clip"), groups, strategy="cls")
    with pytest.raises(UnsupportedError, match="activation 'mish' is not supported"):
        build(vision_config("clip", hidden_act="mish"), groups)
    with pytest.raises(ConfigError, match=r"image_size=\(0, 0\), patch_size=25"):
        build(vision_config("clip", patch_size=25), groups)
    encoder = build(vision_config("clip"), groups)
    with pytest.raises(InputError, match=r"float32 \[2, 3, 8, 8\]; expected .* \[N, 3, 24, 24\]"):
        encoder(torch.zeros(2, 3, 8, 8))


def test_refusals(ranks: RankPool) -> None:
    ranks(1)(refusals)
