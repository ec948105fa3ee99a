"""Adapters on a tiny model in one process. Each check runs in the rank pool."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.rank_pool import RankPool
from tests.unit.core.mimo.tiny import build, inputs


def adapted_model(**changes: Any) -> Any:
    from megatron.mimo.lora import LoraSettings, add_adapters

    model = build({"num_layers": 2})
    settings: dict[str, Any] = {"modules": ("language",), "rank": 3, **changes}
    add_adapters(model, LoraSettings(**settings))
    return model


def check_the_first_forward_is_the_models_own() -> None:
    from megatron.mimo.lora import LoraSettings, add_adapters

    model = build({"num_layers": 2})
    before, _ = model(**inputs())
    found = add_adapters(model, LoraSettings(modules=("language",), rank=3))
    assert len(found) == 8
    assert "language.decoder.layers.1.mlp.linear_fc2" in found
    after, _ = model(**inputs())
    assert torch.equal(before, after)


def check_only_adapters_and_other_parts_are_trained() -> None:
    from megatron.mimo.lora import is_adapter

    model = adapted_model(targets=("linear_qkv", "linear_fc2"))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    language = {name for name in trained if name.startswith("language_model.")}
    assert len(language) == 2 * 2 * 2
    assert all(map(is_adapter, language))
    assert {name.split(".")[1] for name in trained - language} == {"images", "audio"}


def check_dropout_is_drawn_in_training_only() -> None:
    model = adapted_model(dropout=0.5)
    for _, layer in layers(model):
        torch.nn.init.normal_(layer.adapter.up)
    batch = inputs()
    first, second = (model.train()(**batch)[0] for _ in range(2))
    assert not torch.equal(first, second)
    first, second = (model.eval()(**batch)[0] for _ in range(2))
    assert torch.equal(first, second)


def check_a_model_without_adapters_loads_into_one_with() -> None:
    plain, model = build({"num_layers": 2}), adapted_model()
    before = {name: layer.adapter.down.clone() for name, layer in layers(model)}
    model.load_state_dict(plain.state_dict())
    for name, layer in layers(model):
        assert torch.equal(layer.adapter.down, before[name])
    lacks_one = model.state_dict()
    lacks_one.pop("language_model.decoder.layers.0.mlp.linear_fc1.adapter.up")
    with pytest.raises(RuntimeError, match=r"Missing key.*adapter\.up"):
        model.load_state_dict(lacks_one)


def check_a_checkpoint_without_adapters_is_asked_for_none() -> None:
    from megatron.mimo.lora import is_adapter, load_without_adapters

    plain, model = build({"num_layers": 2}), adapted_model()
    keys = set(plain.sharded_state_dict())
    load_without_adapters(model)
    assert set(model.sharded_state_dict()) == keys
    model.load_state_dict(plain.state_dict())
    more = set(model.sharded_state_dict()) - keys
    assert len(more) == 2 * 8
    assert all(map(is_adapter, more))


def check_merging_takes_adapters_off() -> None:
    from megatron.core.tensor_parallel import ColumnParallelLinear
    from megatron.mimo.lora import merge_adapters

    model = adapted_model()
    for _, layer in layers(model):
        torch.nn.init.normal_(layer.adapter.up)
    expected, _ = model(**inputs())
    assert merge_adapters(model) == 8
    merged, _ = model(**inputs())
    torch.testing.assert_close(merged, expected)
    qkv = model.language_model.decoder.layers[0].self_attention.linear_qkv
    assert type(qkv) is ColumnParallelLinear
    assert set(model.state_dict()) == set(build({"num_layers": 2}).state_dict())


def check_what_takes_no_adapter() -> None:
    from megatron.core.models.mimo.errors import ConfigError, UnsupportedError
    from megatron.mimo.lora import LoraSettings, add_adapters

    with pytest.raises(UnsupportedError, match=r"images\.encoders\.plain\.linear is a Linear;"):
        adapted_model(modules=("images",), targets=("linear",))
    with pytest.raises(ConfigError, match="--lora 'speech': no such part"):
        adapted_model(modules=("speech",))
    with pytest.raises(ConfigError, match=r"all layers of a stack.*'language\.decoder'"):
        adapted_model(modules=("language.decoder.layers.1",))
    tied = build(share_embeddings_and_output_weights=True)
    settings = LoraSettings(modules=("language",), targets=("output_layer",))
    with pytest.raises(UnsupportedError, match="is the embedding, which takes no adapter"):
        add_adapters(tied, settings)
    model = adapted_model()
    with pytest.raises(UnsupportedError, match="has an adapter already"):
        add_adapters(model, LoraSettings(modules=("language",)))


def layers(model: Any) -> list[tuple[str, Any]]:
    from megatron.mimo.lora import adapted

    return list(adapted(model))


CHECKS: list[Callable[[], None]] = [
    value for name, value in list(globals().items()) if name.startswith("check_")
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_adapters(ranks: RankPool, check: Callable[[], None]) -> None:
    ranks(1)(check)
