"""Names of a model's parts, and freezing by them. Each check runs in the rank pool."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.rank_pool import RankPool
from tests.unit.core.mimo.tiny import build, inputs


def trainable(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def check_paths_inside_modules() -> None:
    model = build({"num_layers": 2})
    names = set(dict(model.named_parameters()))
    for frozen, expected in {
        "language.decoder.layers.1": "language_model.decoder.layers.1.",
        "language.decoder.layers.0.mlp": "language_model.decoder.layers.0.mlp.",
        "language.embedding": "language_model.embedding.",
        "images.encoders.plain.linear.bias": "modality_submodules.images.encoders.plain.linear.b",
    }.items():
        model.freeze(frozen)
        rest = {name for name in names if not name.startswith(expected)}
        assert trainable(model) == rest != names
        model.freeze("language", "images", frozen=False)


def check_a_misspelt_path() -> None:
    from megatron.core.models.mimo.errors import ConfigError

    model = build({"num_layers": 2})
    for name, near in {
        "language.decoder.layer.0": "'language.decoder.layers.0'",
        "language.decoder.layers.2": "'language.decoder.layers.",
        "language_model.embedding": "'language.embedding'",
        "images.encoder": "'images.encoders'",
        "images.encoders.plain.lin": "'images.encoders.plain.linear'",
    }.items():
        with pytest.raises(ConfigError, match=f"no such part; did you mean .*{near}"):
            model.freeze(name)
        assert trainable(model) == set(dict(model.named_parameters()))


def check_what_another_stage_may_hold() -> None:
    from megatron.core.models.mimo.errors import ConfigError

    model = build(pre_process=False)
    model.freeze("language.embedding", "images.encoders.plain.linear", "images.projections.0")
    assert trainable(model) == set(dict(model.named_parameters()))
    with pytest.raises(ConfigError, match=r"did you mean 'images\.encoders\.plain'"):
        model.freeze("images.encoders.plan")


def check_layers_are_numbered_over_all_stages() -> None:
    model = build({"num_layers": 2})
    for position, layer in enumerate(model.language_model.decoder.layers):
        layer.layer_number = 5 + position  # as on the third of several stages
    model.freeze("language.decoder.layers.4")
    frozen = set(dict(model.named_parameters())) - trainable(model)
    assert frozen
    assert all(name.startswith("language_model.decoder.layers.0.") for name in frozen)


def check_a_tied_output_layer_is_the_embedding() -> None:
    from megatron.core.models.mimo.model.freezing import paths_by_parameter

    tied = ("language.embedding.word_embeddings.weight", "language.output_layer.weight")
    for whole in ({}, {"pre_process": False}):
        model = build(share_embeddings_and_output_weights=True, **whole)
        paths = paths_by_parameter(model)
        assert list(paths.values()).count(tied) == 1
        model.freeze("language.embedding.word_embeddings")
        assert [paths[p] for p in paths if not p.requires_grad] == [tied]


def check_recomputed_layers_keep_their_gradients() -> None:
    plain = build({"num_layers": 2})
    recomputed = build(
        {
            "num_layers": 2,
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    )
    recomputed.load_state_dict(plain.state_dict())
    gradients = []
    for model in (plain, recomputed):
        model.freeze("images", "audio", "language.embedding")  # nothing before layer 0 is trained
        model.freeze("language.decoder.layers.0.self_attention")
        losses_BS, _ = model.train()(**inputs())
        losses_BS.sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert set(gradients[0]) == trainable(plain)
    torch.testing.assert_close(gradients[1], gradients[0])


def check_recomputed_mlps_with_biases() -> None:
    """In megatron-core's own layers: the bias is no output of the recomputed function."""
    plain = build({"num_layers": 2})
    selective = {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}
    recomputed = build({"num_layers": 2, **selective})
    recomputed.load_state_dict(plain.state_dict())
    gradients = []
    for model in (plain, recomputed):
        losses_BS, _ = model.train()(**inputs())
        assert all(p.is_leaf for p in model.parameters())  # or backward would never end
        losses_BS.sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    torch.testing.assert_close(gradients[1], gradients[0])


CHECKS: list[Callable[[], None]] = [
    check_paths_inside_modules,
    check_a_misspelt_path,
    check_what_another_stage_may_hold,
    check_layers_are_numbered_over_all_stages,
    check_a_tied_output_layer_is_the_embedding,
    check_recomputed_layers_keep_their_gradients,
    check_recomputed_mlps_with_biases,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_freezing(ranks: RankPool, check: Callable[[], None]) -> None:
    ranks(1)(check)
