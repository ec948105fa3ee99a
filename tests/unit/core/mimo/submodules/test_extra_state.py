"""Weights load whether or not a layer keeps state for FP8, as Transformer Engine's do."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron.core.models.mimo.submodules.state import WITHOUT_EXTRA_STATE, forgive_extra_state
from megatron.mimo.backend import select_backend
from tests.rank_pool import RankPool
from tests.unit.core.mimo.tiny import build


class EngineAttention(torch.nn.Module):
    """As Transformer Engine's: extra state, missed by name under ``core_attention`` alone."""

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_post_hook(self._forgive_one_name)

    @staticmethod
    def _forgive_one_name(_: torch.nn.Module, incompatible: Any) -> None:
        missing = incompatible.missing_keys
        missing[:] = [key for key in missing if "core_attention._extra_state" not in key]

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None: ...


def check_missing_and_unexpected_extra_state() -> None:
    model = build()
    plain = {
        key: value for key, value in model.state_dict().items() if not key.endswith("_extra_state")
    }
    model.language_model.wrapper = torch.nn.ModuleDict({"inner": EngineAttention()})
    assert "language_model.wrapper.inner._extra_state" in model.state_dict()
    model.load_state_dict(plain)
    model.load_state_dict(plain | {"language_model.gone._extra_state": torch.empty(0)})
    lost = next(iter(plain))
    with pytest.raises(RuntimeError, match=lost):
        model.load_state_dict({key: value for key, value in plain.items() if key != lost})
    with pytest.raises(RuntimeError, match=r"language_model\.gone\.weight"):
        model.load_state_dict(plain | {"language_model.gone.weight": torch.empty(0)})


def test_strict_loading_asks_for_weights_alone(ranks: RankPool) -> None:
    ranks(1)(check_missing_and_unexpected_extra_state)


def test_the_hook_keeps_what_is_no_extra_state() -> None:
    keys = SimpleNamespace(
        missing_keys=["a.core_attention.inner._extra_state", "a.weight"],
        unexpected_keys=["b._extra_state", "b.bias"],
    )
    forgive_extra_state(torch.nn.Identity(), keys)
    assert keys.missing_keys == ["a.weight"]
    assert keys.unexpected_keys == ["b.bias"]


@pytest.mark.parametrize(
    ("fp8", "fp4", "left_out"), [(None, None, True), ("hybrid", None, False), (None, "e2m1", False)]
)
def test_checkpoints_hold_it_for_low_precision_alone(
    fp8: str | None, fp4: str | None, left_out: bool
) -> None:
    """Else a run with Transformer Engine looks for it in checkpoints of one without, and dies."""
    select_backend("cpu")
    from megatron.training.checkpointing import _build_sharded_state_dict_metadata

    args = SimpleNamespace(
        fp8=fp8, fp4=fp4, use_distributed_optimizer=False, ckpt_format="torch_dist"
    )
    metadata = _build_sharded_state_dict_metadata(args, dp_cp_group="group")
    assert metadata.get(WITHOUT_EXTRA_STATE, False) is left_out
