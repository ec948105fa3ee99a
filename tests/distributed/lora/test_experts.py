"""Adapters in models with experts: refused on experts by name, PEFT's on attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.lora.ranks import compare, compute_adapted, merged_logits
from tests.distributed.models.expected import Expected, compute_expected
from tests.distributed.models.ranks import Layout
from tests.distributed.models.text_kinds import with_text
from tests.rank_pool import RankPool

MODULES = ("language",)
LAYOUT = Layout(tp=2, changes={"sequence_parallel": True})


def refusal(expected: Expected) -> str:
    """In which words adapters on experts are refused."""
    import torch

    from megatron.core.models.mimo.errors import UnsupportedError
    from megatron.mimo.arguments.standalone import build_model, model_settings, process_groups
    from megatron.mimo.lora import LoraSettings, add_adapters
    from megatron.mimo.models import load_family

    family = load_family("llava")
    with process_groups():
        settings = model_settings(family, expected.config)
        model = build_model(family, expected.config, settings, device=torch.device("cpu"))
        with pytest.raises(UnsupportedError) as refused:
            add_adapters(model, LoraSettings(modules=MODULES, rank=2, alpha=2.0))
    return str(refused.value)


def test_experts_take_no_adapters(ranks: RankPool) -> None:
    (expected,) = ranks(1)(compute_expected, "llava", with_text("qwen3_moe"))
    (words,) = ranks(1)(refusal, expected)
    assert "mlp.experts.local_experts.0.linear_fc1 belongs to an expert" in words
    assert "--lora-targets" in words


@pytest.mark.parametrize(
    ("name", "change"),
    [
        pytest.param("llava", with_text("qwen3_moe"), marks=pytest.mark.wide),
        ("qwen3_5_moe", None),
    ],
)
def test_attention_beside_experts_equals_peft(
    ranks: RankPool, tmp_path: Path, name: str, change: Any
) -> None:
    """And the projections of linear layers."""
    (wanted,) = ranks(1)(compute_adapted, name, MODULES, tmp_path, change)
    assert name == "llava" or any(".in_proj." in one for one in wanted.gradients)
    for loss, difference in ranks(2)(compare, name, LAYOUT, MODULES, wanted, tmp_path):
        assert loss == pytest.approx(wanted.base.loss, rel=1e-4)
        assert difference < 1e-4
    merged = ranks(2)(merged_logits, name, MODULES, wanted, tmp_path, LAYOUT)
    assert max(merged) < 1e-4
