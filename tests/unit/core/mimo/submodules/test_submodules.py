"""One modality: encoders -> combine -> project. Legend: N rows, S sequence, B batch, H features."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from megatron.core.models.mimo import (
    AudioModalitySubmodules,
    ModalitySubmodules,
    VisionModalitySubmodules,
)
from megatron.core.models.mimo.alignment import EncodedRows
from megatron.core.models.mimo.errors import ConfigError, InputError
from megatron.core.transformer.spec_utils import ModuleSpec


class Returns(nn.Module):
    """An encoder that returns what it is given."""

    def forward(self, value: Any) -> Any:
        return value


class Scale(nn.Module):
    def __init__(self, by: float = 2.0) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.tensor(by))

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return value * self.by


class OutputAndBias(nn.Module):
    """What Megatron's linear layers return."""

    def __init__(self, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.bias_H = bias

    def forward(self, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return value, self.bias_H


def rows(count: int, width: int = 3) -> torch.Tensor:
    return torch.arange(float(count * width)).view(count, width)


def one_encoder(**attributes: Any) -> ModalitySubmodules:
    encoder = Returns()
    for name, value in attributes.items():
        setattr(encoder, name, value)
    return VisionModalitySubmodules(encoders={"e": encoder})


@pytest.mark.parametrize("kind", [VisionModalitySubmodules, AudioModalitySubmodules])
def test_from_spec_builds_the_parts_of_the_stage(kind: type[ModalitySubmodules]) -> None:
    spec = ModuleSpec(
        module=kind,
        submodules={
            "encoders": {"a": ModuleSpec(module=Returns), "b": ModuleSpec(module=Returns)},
            "decoders": {"d": ModuleSpec(module=Returns)},
            "input_projections": [ModuleSpec(module=Scale, params={"by": 3.0})],
            "output_projections": [ModuleSpec(module=Scale)],
        },
    )
    whole = kind.from_spec(spec)
    assert type(whole) is kind
    assert list(whole.encoders) == ["a", "b"]
    assert list(whole.decoders) == ["d"]
    assert whole.input_projections[0].by == 3.0
    assert len(whole.output_projections) == 1
    first = kind.from_spec(spec, is_first_stage=True, is_last_stage=False)
    assert (first.is_first_stage, first.is_last_stage) == (True, False)
    assert (len(first.input_projections), len(first.output_projections)) == (0, 1)
    last = kind.from_spec(spec, is_first_stage=False, is_last_stage=True)
    assert (len(last.input_projections), len(last.output_projections)) == (1, 0)
    with pytest.raises(AttributeError):
        last.is_first_stage = True  # type: ignore[misc]
    assert set(whole.state_dict()) == {"input_projections.0.by", "output_projections.0.by"}


def test_from_spec_passes_params_to_the_subclass() -> None:
    class Custom(ModalitySubmodules):
        def __init__(self, patches: int, **parts: Any) -> None:
            super().__init__(**parts)
            self.patches = patches

    spec = ModuleSpec(
        module=Custom, params={"patches": 7, "pg_collection": "groups"}, submodules={}
    )
    built = Custom.from_spec(spec)
    assert isinstance(built, Custom)
    assert built.patches == 7
    assert built.pg_collection == "groups"


def test_unknown_parts_are_refused() -> None:
    spec = ModuleSpec(module=ModalitySubmodules, submodules={"encoder": {}})
    with pytest.raises(ConfigError, match=r"submodules \['encoder'\]; expected \['encoders'"):
        ModalitySubmodules.from_spec(spec)
    with pytest.raises(ConfigError, match=r"unknown arguments \['input_projection'\]"):
        ModalitySubmodules(input_projection=[])
    with pytest.raises(ConfigError, match="got 2 input_projections"):
        ModalitySubmodules(input_projections=[Scale(), Scale()])


def test_batch_first_output_becomes_rows_sample_by_sample() -> None:
    value_BSH = rows(6).view(2, 3, 3)
    (rows_NH,) = one_encoder().encode({"e": {"value": value_BSH}})
    assert rows_NH.equal(rows(6))


def test_sequence_first_output_does_not_mix_samples() -> None:
    value_SBH = rows(6).view(2, 3, 3).transpose(0, 1)
    (rows_NH,) = one_encoder(output_layout="sbh").encode({"e": {"value": value_SBH}})
    assert rows_NH.equal(rows(6))


def test_first_of_a_tuple_is_taken() -> None:
    (rows_NH,) = one_encoder().encode({"e": {"value": (rows(2), "pooled", None)}})
    assert rows_NH.equal(rows(2))


@pytest.mark.parametrize("value", [torch.zeros(3), torch.zeros(1, 2, 3, 4), "text", None, ()])
def test_output_that_is_no_rows_is_refused(value: Any) -> None:
    with pytest.raises(InputError, match=r"Encoder 'e' output .* is not supported"):
        one_encoder().encode({"e": {"value": value}})


def test_unknown_layout_is_refused() -> None:
    with pytest.raises(ConfigError, match="output_layout 'hsb'"):
        one_encoder(output_layout="hsb").encode({"e": {"value": torch.zeros(1, 2, 3)}})


def test_inputs_have_to_name_every_encoder_and_no_other() -> None:
    both = ModalitySubmodules(encoders={"a": Returns(), "b": Returns()})
    with pytest.raises(InputError, match="No inputs found for encoder 'b'"):
        both.encode({"a": {"value": rows(1)}})
    with pytest.raises(InputError, match=r"encoders \['c'\], which do not exist.*\['a', 'b'\]"):
        both.encode({"a": {"value": rows(1)}, "b": {"value": rows(1)}, "c": {}})
    assert both.encode({}) == []


def test_encoders_are_combined_in_their_order() -> None:
    both = ModalitySubmodules(encoders={"a": Returns(), "b": Returns()})
    combined_NH = both({"b": {"value": rows(1)}, "a": {"value": rows(2)}})
    assert combined_NH.equal(torch.cat([rows(2), rows(1)]))


def test_combining_refuses_nothing_and_different_widths() -> None:
    submodules = ModalitySubmodules()
    with pytest.raises(ValueError, match="Cannot combine empty list"):
        submodules.combine_embeddings([])
    with pytest.raises(InputError, match=r"widths \[3, 2\]"):
        submodules.combine_embeddings([rows(2), rows(2, 2)])


def test_projections_take_either_direction() -> None:
    submodules = ModalitySubmodules(input_projections=[Scale(2.0)], output_projections=[Scale(5.0)])
    assert submodules.project_embeddings([rows(1), rows(1)]).equal(2 * rows(1).repeat(2, 1))
    assert submodules.project_embeddings([rows(2)], is_input=False).equal(5 * rows(2))
    assert ModalitySubmodules().project_embeddings([rows(2)]).equal(rows(2))


def test_bias_that_megatrons_linear_returns_is_added() -> None:
    bias_H = torch.tensor([1.0, 2.0, 3.0])
    with_bias = ModalitySubmodules(input_projections=[OutputAndBias(bias_H)])
    assert with_bias.project_embeddings([rows(2)]).equal(rows(2) + bias_H)
    without = ModalitySubmodules(input_projections=[OutputAndBias(None)])
    assert without.project_embeddings([rows(2)]).equal(rows(2))


def test_forward_contract() -> None:
    parts: dict[str, Any] = {"encoders": {"e": Returns()}, "input_projections": [Scale(2.0)]}
    submodules = ModalitySubmodules(**parts)
    assert submodules({"e": {"value": rows(2)}}).equal(2 * rows(2))
    assert submodules(hidden_states=rows(2)).equal(2 * rows(2))
    assert submodules({}) is None
    assert submodules() is None
    with pytest.raises(ValueError, match="mutually exclusive"):
        submodules(encoder_inputs={}, hidden_states=rows(2))
    first = ModalitySubmodules(**parts, is_last_stage=False)
    assert first({"e": {"value": rows(2)}}).equal(rows(2))


def test_every_stage_runs_its_layers() -> None:
    """The output of a stage travels as it is; the last stage gives rows."""

    class Stage(nn.Module):
        output_layout = "sbh"

        def forward(self, hidden_states: torch.Tensor, mask: None) -> torch.Tensor:
            assert mask is None
            return hidden_states + 1

    parts: dict[str, Any] = {"encoders": {"e": Stage()}, "input_projections": [Scale(2.0)]}
    first = ModalitySubmodules(**parts, is_last_stage=False)
    middle = ModalitySubmodules(**parts, is_first_stage=False, is_last_stage=False)
    last = ModalitySubmodules(**parts, is_first_stage=False)
    inputs_SBH = torch.arange(12.0).view(3, 2, 2)
    hidden = first({"e": {"hidden_states": inputs_SBH, "mask": None}})
    assert hidden.equal(inputs_SBH + 1)
    hidden = middle(hidden_states=hidden)
    assert hidden.equal(inputs_SBH + 2)
    expected_NH = 2 * (inputs_SBH + 3).transpose(0, 1).reshape(-1, 2)
    assert last(hidden_states=hidden).equal(expected_NH)
    assert last({"e": {"hidden_states": inputs_SBH, "mask": None}}) is None
    several = {"e": Stage(), "f": Stage()}
    with pytest.raises(ValueError, match="expected one"):
        ModalitySubmodules(encoders=several, is_last_stage=False)({"e": {}, "f": {}})


def test_decoding_is_for_subclasses() -> None:
    with pytest.raises(NotImplementedError, match="VisionModalitySubmodules has no decode"):
        VisionModalitySubmodules().decode(rows(1), {})


@pytest.mark.parametrize("rows_need_gradient", [True, False])
def test_recomputed_projections_keep_no_activations(rows_need_gradient: bool) -> None:
    """Rows of a frozen encoder need no gradient; their projection gets its own all the same."""

    def run(recompute: bool) -> tuple[list[torch.Tensor], set[int]]:
        torch.manual_seed(3)
        projection = nn.Sequential(nn.Linear(3, 50), nn.Tanh(), nn.Linear(50, 4))
        submodules = ModalitySubmodules(
            encoders={"e": Returns()},
            input_projections=[projection],
            recompute_projections=recompute,
        )
        kept: set[int] = set()
        value = rows(2).requires_grad_(rows_need_gradient)

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept.add(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out_NH = submodules({"e": {"value": value}})
        assert out_NH is not None
        kept_in_forward = set(kept)
        out_NH.square().sum().backward()
        parameters = [parameter.grad for parameter in projection.parameters()]
        gradients = [*parameters, value.grad if rows_need_gradient else torch.zeros(0)]
        return [gradient for gradient in gradients if gradient is not None], kept_in_forward

    expected, kept = run(False)
    gradients, kept_recomputing = run(True)
    assert len(gradients) == 5
    assert all(map(torch.equal, gradients, expected))
    assert 2 * 50 in kept
    assert 2 * 50 not in kept_recomputing


def test_levels_are_combined_and_projected_beside_their_rows() -> None:
    encoders = {"a": Returns(), "b": Returns()}
    for encoder in encoders.values():
        encoder.num_levels = 2  # type: ignore[assignment]
    submodules = ModalitySubmodules(
        encoders=encoders,
        input_projections=[Scale(2.0)],
        level_projections=[Scale(3.0), OutputAndBias(torch.ones(2))],
    )
    encoded = {
        name: {"value": EncodedRows(rows_NH=rows(count), levels=(rows(count, 4), rows(count, 2)))}
        for name, count in (("a", 2), ("b", 1))
    }
    got = submodules(encoded)
    assert isinstance(got, EncodedRows)
    assert got.rows_NH.equal(2 * torch.cat([rows(2), rows(1)]))
    assert got.levels[0].equal(3 * torch.cat([rows(2, 4), rows(1, 4)]))
    assert got.levels[1].equal(torch.cat([rows(2, 2), rows(1, 2)]) + 1)


def test_levels_of_samples_become_rows_in_the_layout_of_the_encoder() -> None:
    value_SBH = rows(6).view(2, 3, 3).transpose(0, 1)
    encoded = EncodedRows(rows_NH=value_SBH, levels=(value_SBH + 1,))
    submodules = one_encoder(output_layout="sbh", num_levels=1)
    (got,) = submodules.encode({"e": {"value": encoded}})
    assert isinstance(got, EncodedRows)
    assert got.rows_NH.equal(rows(6))
    assert got.levels[0].equal(rows(6) + 1)


def test_levels_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match=r"level 0 of encoded rows is torch.float32 \[1, 3\]"):
        EncodedRows(rows_NH=rows(2), levels=(rows(1),))
    with pytest.raises(InputError, match="gave 1 levels of its rows, and its num_levels is 0"):
        one_encoder().encode({"e": {"value": EncodedRows(rows_NH=rows(2), levels=(rows(2),))}})
    with pytest.raises(InputError, match="gave 0 levels of its rows, and its num_levels is 1"):
        one_encoder(num_levels=1).encode({"e": {"value": rows(2)}})
    uneven = ModalitySubmodules(
        encoders={"a": one_encoder(num_levels=1).encoders["e"], "b": Scale()}
    )
    with pytest.raises(ConfigError, match=r"give \{'a': 1, 'b': 0\} levels"):
        _ = uneven.num_levels
