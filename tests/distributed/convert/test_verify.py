"""There and back for every family; differences are found; processes of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron.mimo.models import family_names
from tests.distributed.convert.models import make_and_import
from tests.rank_pool import RankPool
from tests.time_limits import HANG


def verify_tiny(name: str) -> dict[str, bool]:
    from megatron.mimo.convert.verify import verify_tiny

    return {finding.title: finding.equal for finding in verify_tiny(name)}


@pytest.mark.parametrize("name", family_names())
def test_every_family_goes_there_and_back(ranks: RankPool, name: str) -> None:
    (found,) = ranks(1)(verify_tiny, name)
    titles = ["config", "keys", "weights", "coverage", "logits", "gradients", "generation"]
    assert found == dict.fromkeys([*titles, "export", "reload"], True)


def verify_with_a_wrong_change() -> str:
    from megatron.core.models.mimo.errors import ConfigError
    from megatron.mimo.convert.verify import verify_tiny

    try:
        verify_tiny("llava", changes={"transformer_implx": "local"})
    except ConfigError as error:
        return str(error)
    return "not refused"


def test_changes_reach_our_model(ranks: RankPool) -> None:
    assert ranks(1)(verify_with_a_wrong_change) == [
        "transformer_implx: not an argument of a model alone; it takes those of Megatron's "
        "TransformerConfig, of the vocabulary and of rotary embeddings"
    ]


def verify_on_processes(name: str, folder: Path) -> list[str]:
    from megatron.mimo.convert.verify import verify_checkpoint

    make_and_import(name, folder)
    return [str(one) for one in verify_checkpoint(folder / "hf", folder / "mimo", tp_size=2)]


@pytest.mark.wide
@pytest.mark.parametrize("name", ["llava", "qwen3_vl_moe"])
def test_starts_the_processes_of_a_layout(ranks: RankPool, tmp_path: Path, name: str) -> None:
    """Experts too, whose gradients tensor-parallel ranks would otherwise count twice."""
    (lines,) = ranks(1, timeout=HANG)(verify_on_processes, name, tmp_path)
    assert len(lines) == 7
    assert all(line.startswith("ok") for line in lines), lines


def verify_other(folder: Path) -> tuple[int, dict[str, str]]:
    """The directory's weights change after the import: one value of one weight."""
    from safetensors.torch import load_file, save_file

    from megatron.mimo.convert.command import main
    from megatron.mimo.convert.verify import verify_checkpoint

    make_and_import("llava", folder)
    name = "language_model.model.layers.1.mlp.gate_proj.weight"
    for path in (folder / "hf").glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            tensors[name][3, 5] += 1.0
            save_file(tensors, path, metadata={"format": "pt"})
    findings = verify_checkpoint(folder / "hf", folder / "mimo")
    code = main(["verify", str(folder / "hf"), str(folder / "mimo"), "--weights-only"])
    return code, {one.title: str(one) for one in findings if not one.equal}


def test_finds_a_single_wrong_value(ranks: RankPool, tmp_path: Path) -> None:
    ((code, wrong),) = ranks(1)(verify_other, tmp_path)
    assert code == 1
    assert wrong.keys() == {"weights", "logits", "gradients", "generation"}
    assert "layers.1.mlp.gate_proj.weight: largest difference 1.00e+00" in wrong["weights"]


def verify_types(folder: Path) -> str:
    from megatron.mimo.convert.exporting import export_model
    from megatron.mimo.convert.verify import _compare_files, verify_checkpoint

    make_and_import("llava", folder)
    export_model(folder / "mimo", folder / "half", dtype=torch.bfloat16, shown=False)
    findings = verify_checkpoint(folder / "half", folder / "mimo", weights_only=True)
    return "\n".join(map(str, [*findings, _compare_files(folder / "hf", folder / "half")]))


def test_finds_another_dtype(ranks: RankPool, tmp_path: Path) -> None:
    (text,) = ranks(1)(verify_types, tmp_path)
    assert "FAIL  weights     0 of 80" in text
    assert "torch.bfloat16 / torch.float32" in text
    assert "FAIL  export" in text
    assert "model.safetensors.index.json" in text
