"""Qwen3.5 beyond what every family shows: sequence parallelism, experts on ranks, training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.convert.models import make_model, same_files
from tests.distributed.models.expected import Expected, compute_expected
from tests.distributed.models.ranks import Layout, train
from tests.distributed.models.test_families import LOSSES, check
from tests.distributed.models.text_kinds import take_all_experts
from tests.rank_pool import RankPool
from tests.tiers import some

SP = {"sequence_parallel": True}
ALLTOALL = {"moe_token_dispatcher_type": "alltoall"}
EQUAL = {
    "tp2-sp-pp2": ("qwen3_5", Layout(tp=2, pp=2, changes=SP)),
    "tp2-sp-cp2": ("qwen3_5", Layout(tp=2, cp=2, changes=SP)),
    "ep2": ("qwen3_5_moe", Layout(dp=2, ep=2)),
    "ep2-tp2-sp": ("qwen3_5_moe", Layout(tp=2, ep=2, etp=1, changes=SP | ALLTOALL)),
}
TRAINED = {
    "tp2": ("qwen3_5", Layout(tp=2)),
    "pp2": ("qwen3_5", Layout(pp=2)),
    "cp2": ("qwen3_5", Layout(cp=2)),
    "ep2": ("qwen3_5_moe", Layout(dp=2, ep=2)),
}


def tie(config: Any) -> None:
    """Ties the output layer, and has three linear layers to one of attention, with biases."""
    config.tie_word_embeddings = True
    config.text_config.layer_types = [*["linear_attention"] * 3, "full_attention"]
    config.text_config.attention_bias = True


@pytest.fixture(scope="module")
def expected(ranks: RankPool) -> Callable[[str], Expected]:
    known: dict[str, Expected] = {}
    changes = {"qwen3_5": tie, "qwen3_5_moe": take_all_experts}

    def of(name: str) -> Expected:
        if name not in known:
            change = changes[name]
            (known[name],) = ranks(1)(
                compute_expected, name, change, samples=5, text_only=True, train=True
            )
        return known[name]

    return of


@pytest.mark.parametrize("case", some(EQUAL, "tp2-sp-pp2", "ep2"))
def test_equals_transformers(
    ranks: RankPool, expected: Callable[[str], Expected], case: str
) -> None:
    name, layout = EQUAL[case]
    check(ranks, name, layout, expected(name))


@pytest.mark.parametrize("case", some(TRAINED))
def test_trains_as_a_plain_loop_does(
    ranks: RankPool, expected: Callable[[str], Expected], case: str
) -> None:
    name, layout = TRAINED[case]
    wanted = expected(name)
    for losses in ranks(layout.world_size)(train, name, layout, wanted):
        assert losses == pytest.approx(wanted.trained, rel=LOSSES)


def carry(folder: Path) -> bool:
    """Import and export of a directory with weights for multi-token prediction, and training it."""
    from safetensors.torch import load_file, save_file

    from megatron.core.models.mimo.errors import UnsupportedError
    from megatron.mimo.arguments.standalone import build_model, model_settings, process_groups
    from megatron.mimo.convert.exporting import export_model
    from megatron.mimo.convert.importing import import_model
    from megatron.mimo.models import load_family

    make_model("qwen3_5", folder / "hf")
    tensors = {}
    for path in (folder / "hf").glob("*.safetensors"):
        tensors |= load_file(path)
        path.unlink()
    (folder / "hf/model.safetensors.index.json").unlink()
    tensors |= {
        "mtp.fc.weight": torch.randn(64, 128),
        "mtp.norm.weight": torch.randn(64),
        "mtp.layers.0.mlp.gate_proj.weight": torch.randn(96, 64),
    }
    save_file(tensors, folder / "hf/model.safetensors", metadata={"format": "pt"})
    import_model(folder / "hf", folder / "mimo", shown=False)
    export_model(folder / "mimo", folder / "back", shown=False)
    family = load_family("qwen3_5")
    with process_groups() as device:
        settings = model_settings(family, family.tiny(), changes={"mtp_num_layers": 1})
        with pytest.raises(UnsupportedError, match="mtp_num_layers = 1: multi-token prediction"):
            build_model(family, family.tiny(), settings, device=device)
    return same_files(folder / "hf", folder / "back")


def test_weights_for_multi_token_prediction_travel_untouched(
    ranks: RankPool, tmp_path: Path
) -> None:
    assert ranks(1)(carry, tmp_path) == [True]
