"""Rotary angles of several kinds, and their limits. S positions, D channels that turn."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron.core.models.mimo.errors import UnsupportedError
from megatron.mimo.layers.rotary import Frequencies, RotaryAngles
from megatron.mimo.layers.traits import LayerTraits

GLOBAL, LOCAL = (1.0, 0.25), (0.5, 0.125)


def angles(*kinds: Frequencies) -> Any:
    return RotaryAngles(kinds, kv_channels=4, rotary_percent=1.0, use_cpu_initialization=True)


def test_each_kind_has_its_own_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    rotary = angles(Frequencies(inverse=GLOBAL), Frequencies(inverse=LOCAL))
    found_SD = rotary.get_emb(3, offset=2)[:, 0, 0]
    positions_S = torch.arange(2, 5)[:, None]
    wanted = [positions_S * torch.tensor([*kind, *kind]) for kind in (GLOBAL, LOCAL)]
    assert torch.equal(found_SD, torch.cat(wanted, dim=1))


def test_no_text_beyond_what_frequencies_are_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    rotary = angles(Frequencies(inverse=GLOBAL, longest=8))
    assert len(rotary.get_emb(8)) == 8
    with pytest.raises(UnsupportedError, match="for 9 positions; expected at most 8"):
        rotary.get_emb(9)


def test_a_layer_knows_its_kind() -> None:
    traits = LayerTraits(rotary_kinds=2, rotary_kind=(1, 1, 0), rotary_factors=(1.5, 1.0))
    assert [traits.kind_of_layer(layer) for layer in range(3)] == [1, 1, 0]
    assert [traits.factor_of_layer(layer) for layer in range(3)] == [1.0, 1.0, 1.5]
    assert LayerTraits().factor_of_layer(7) == 1.0
