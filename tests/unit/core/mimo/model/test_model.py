"""MimoModel on one process. Each check runs in the rank pool.

Legend: S sequence, B micro-batch, H hidden, N rows of one modality.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.rank_pool import RankPool
from tests.unit.core.mimo.tiny import (
    HIDDEN,
    IDS_BS,
    LENGTH,
    VOCABULARY,
    Encoder,
    StoppedError,
    arguments_of_a_call_that_stops,
    build,
    inputs,
    merge_by_loop,
    modality_spec,
    seen_by_language_model,
)


def check_attributes() -> None:
    model = build()
    assert model.config is model.language_model.config
    assert model.special_token_ids == model.mimo_config.special_token_ids
    assert model.special_token_ids is not model.mimo_config.special_token_ids
    assert list(model.modality_submodules) == ["images", "audio"]
    assert model.partition_adapter is None
    assert model.colocated_comms == {}
    assert model.input_tensors is None
    assert model.role.has_language_module
    assert model.decoder is model.language_model.decoder  # what Megatron looks up from outside
    assert model.pre_process is True
    assert model.shared_embedding_or_output_weight() is not None
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = model.nothing_like_it
    model.destroy()


def check_merged_embeddings_and_gradients() -> None:
    model, batch = build(), inputs()
    seen = seen_by_language_model(model)
    losses_BS, mask_BS = model(**batch)
    assert losses_BS.shape == IDS_BS.shape
    assert mask_BS is batch["loss_mask"]
    expected_SBH = merge_by_loop(model, batch)
    assert torch.equal(seen["decoder_input"], expected_SBH)
    losses_BS.sum().backward()
    got = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.language_model(
        input_ids=None,
        position_ids=None,
        attention_mask=None,
        decoder_input=expected_SBH,
        labels=batch["labels"],
    ).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, msg=name)


def check_all_ways_to_give_positions_agree() -> None:
    from megatron.core.models.mimo.alignment import build_alignment_plan

    model, batch = build(), inputs()
    flat = IDS_BS.view(-1)
    indices = {
        "images": (flat == 30).nonzero()[:, 0],
        "audio": (flat == -200).nonzero()[:, 0],
        "text": ((flat != 30) & (flat != -200)).nonzero()[:, 0],
    }
    derived, _ = model(**batch)
    indexed, _ = model(**batch, modality_token_indices=indices)
    planned, _ = model(
        **batch, alignment_plan=build_alignment_plan(IDS_BS, model.special_token_ids)
    )
    assert torch.equal(derived, indexed)
    assert torch.equal(derived, planned)


def check_without_labels_come_logits() -> None:
    model, batch = build(), inputs()
    del batch["labels"], batch["loss_mask"]
    logits_BSV, mask = model(**batch)
    assert logits_BSV.shape == (*IDS_BS.shape, VOCABULARY)
    assert mask is None


def check_absent_modality_gets_zero_gradients() -> None:
    model = build()
    ids_BS = IDS_BS.where(IDS_BS != -200, 3)
    for absent in ({}, {"audio": None}, {"audio": {}}, {"audio": empty_features()}):
        batch = inputs({"images": 3}, ids_BS=ids_BS)
        batch["modality_inputs"] |= absent
        model.zero_grad()
        model(**batch)[0].sum().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert bool(parameter.grad.any()) != ("audio" in name), name
    with torch.no_grad():
        model(**batch)
    batch = inputs({}, ids_BS=torch.ones_like(IDS_BS))
    batch["modality_inputs"] = None
    model.zero_grad()
    model(**batch)[0].sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def empty_features() -> dict[str, Any]:
    return {"plain": {"features": torch.zeros(0, 5)}}


class Ordered(nn.Module):
    """Registers its layers in the order in which it calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 4)
        self.second = nn.Linear(4, HIDDEN)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.second(self.first(features))
        return out


class Unordered(nn.Module):
    """Registers its layers in another order than it calls them; knows its blank inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Linear(HIDDEN, HIDDEN)
        self.scale = nn.Parameter(torch.ones(HIDDEN))
        self.first = nn.Linear(5, HIDDEN)

    def blank_inputs(self) -> dict[str, torch.Tensor]:
        return {"features": self.scale.new_zeros(1, 5)}

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.second(self.first(features)) * self.scale
        return out


def check_gradients_arrive_in_one_order_with_and_without_a_modality() -> None:
    from megatron.core.models.mimo import VisionModalitySubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec

    projection = ModuleSpec(module=nn.Linear, params={"in_features": 16, "out_features": 16})
    modalities = {
        name: ModuleSpec(
            module=VisionModalitySubmodules,
            submodules={
                "encoders": {"plain": ModuleSpec(module=encoder)},
                "input_projections": [projection],
            },
        )
        for name, encoder in (("images", Unordered), ("audio", Ordered))
    }
    model = build(modalities=modalities)
    arrivals: list[str] = []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: arrivals.append(name))
    orders = []
    for counts, ids_BS in (
        ({"images": 3, "audio": 3}, IDS_BS),
        ({"images": 3}, IDS_BS.where(IDS_BS != -200, 3)),
        ({"audio": 3}, IDS_BS.where(IDS_BS != 30, 3)),
        ({}, torch.ones_like(IDS_BS)),
    ):
        arrivals.clear()
        model(**inputs(counts, ids_BS=ids_BS))[0].sum().backward()
        # Weight and bias of one layer come from one node, in either order.
        orders.append([name.removesuffix(".weight").removesuffix(".bias") for name in arrivals])
    assert orders[1] == orders[2] == orders[3] == orders[0]


def check_recomputed_layers_train_behind_a_frozen_embedding() -> None:
    recompute = {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    }
    model = build(recompute)
    model.freeze("images", "audio")
    model.language_model.embedding.requires_grad_(False)
    model(**inputs())[0].sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    model.freeze("language")
    assert not model(**inputs())[0].requires_grad


def check_learned_positions_reach_every_row() -> None:
    model = build(position_embedding_type="learned_absolute")
    batch = inputs()
    seen = seen_by_language_model(model)
    batch["position_ids"] = torch.stack([torch.arange(8), torch.arange(8).flip(0)])
    table_PH = model.language_model.embedding.position_embeddings.weight
    expected_SBH = merge_by_loop(model, batch) + table_PH[batch["position_ids"].t()]
    model(**batch)
    assert torch.equal(seen["decoder_input"], expected_SBH)
    multimodal = batch["position_ids"].repeat(3, 1, 1)
    multimodal[1:] = 0  # the first channel is the absolute position
    model(**(batch | {"position_ids": multimodal}))
    assert torch.equal(seen["decoder_input"], expected_SBH)
    with pytest.raises(ValueError, match="position_ids are None"):
        model(**(batch | {"position_ids": None}))


def check_dropout_reaches_every_row() -> None:
    model, batch = build({"hidden_dropout": 0.5}), inputs()
    seen = seen_by_language_model(model)
    model(**batch)
    dropped_SB = (seen["decoder_input"] == 0).float().mean(dim=2)
    assert bool((dropped_SB > 0).all())
    assert 0.35 < dropped_SB.mean() < 0.65
    kept = seen["decoder_input"] != 0
    twice_SBH = 2 * merge_by_loop(model, batch)
    assert torch.equal(seen["decoder_input"][kept], twice_SBH[kept])


def check_residual_stream_is_fp32_where_asked() -> None:
    half = {"bf16": True, "params_dtype": torch.bfloat16, "fp32_residual_connection": True}
    images = {"images": modality_spec(dtype=torch.bfloat16)}
    model = build(half, modalities=images, tokens={"images": 30})
    assert model.language_model.embedding.word_embeddings.weight.dtype == torch.bfloat16
    seen = arguments_of_a_call_that_stops(model)
    with pytest.raises(StoppedError):
        model(**inputs({"images": 3}, ids_BS=IDS_BS.clamp(min=0)))
    assert seen["decoder_input"].dtype == torch.float32


def check_hidden_states_of_the_previous_stage_are_used_once() -> None:
    model = build(pre_process=False)
    assert not model.role.has_modality_modules
    assert not list(model.modality_submodules)
    batch = inputs()
    with pytest.raises(ValueError, match="call set_input_tensor before every forward"):
        model(**batch)
    hidden_SBH = torch.randn(LENGTH, 2, HIDDEN)
    results = []
    for given in (hidden_SBH, [hidden_SBH], {"language": hidden_SBH}, {"language": [hidden_SBH]}):
        model.set_input_tensor(given)
        results.append(model(**batch)[0])
        assert model.input_tensors is None
        with pytest.raises(ValueError, match="set_input_tensor"):
            model(**batch)
    assert all(torch.equal(result, results[0]) for result in results)
    model.set_input_tensor(2 + hidden_SBH.flip(0))
    assert not torch.allclose(model(**batch)[0], results[0])


def check_stage_before_the_last_gives_hidden_states() -> None:
    output, mask = build(post_process=False)(**inputs())
    assert output.shape == (LENGTH, 2, HIDDEN)
    assert mask is not None


def check_freezing_by_name() -> None:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.mimo.errors import ConfigError

    model = build()

    def trainable() -> set[str]:
        return {name for name, p in model.named_parameters() if p.requires_grad}

    everything = trainable()
    model.freeze("language")
    assert trainable() == {name for name in everything if not name.startswith("language_model.")}
    model.freeze("images.encoders.plain", "audio")
    assert trainable() == set()
    model.freeze("language", "images", "audio", frozen=False)
    assert trainable() == everything
    model.freeze("images.projections", "images.decoders")  # exist, and hold nothing
    assert trainable() == everything
    with pytest.raises(ConfigError, match=r"cannot freeze 'image': .*'images\.encoders\.plain'"):
        model.freeze("image")
    later = build(pre_process=False)
    later.freeze("images.encoders.plain")  # another stage holds it
    with pytest.raises(ConfigError):
        later.freeze("images.encoders.other")
    model.language_model = DistributedDataParallel(
        model.config, DistributedDataParallelConfig(), model.language_model
    )
    with pytest.raises(ConfigError, match="freeze before wrapping"):
        model.freeze("language")


def check_every_parameter_is_saved() -> None:
    from megatron.core.models.mimo import VisionModalitySubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec

    class Extended(VisionModalitySubmodules):
        def __init__(self, **parts: Any) -> None:
            super().__init__(**parts)
            self.separator_H = nn.Parameter(torch.zeros(HIDDEN))
            self.register_buffer("mean", torch.zeros(3))
            self.extra = nn.Sequential(nn.Linear(2, 2))

    spec = ModuleSpec(
        module=Extended, submodules={"encoders": {"plain": ModuleSpec(module=Encoder)}}
    )
    model = build(modalities={"images": spec, "audio": modality_spec()})
    plain, sharded = model.state_dict(), model.sharded_state_dict()
    extra = {key for key in plain if key.endswith("_extra_state")}
    assert set(plain) - extra == {key for key in sharded if not key.endswith("_extra_state")}
    for name in ("separator_H", "mean", "extra.0.weight", "encoders.plain.linear.bias"):
        assert f"modality_submodules.images.{name}" in sharded
    for key in set(plain) - extra:
        assert sharded[key].data.shape == plain[key].shape


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_model(ranks: RankPool, check: Callable[[], None]) -> None:
    ranks(1)(check)
