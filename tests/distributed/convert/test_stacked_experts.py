"""Experts in all ways in which files hold them: imported, verified, exported byte for byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.convert.models import same_files
from tests.distributed.models.text_kinds import use_text
from tests.rank_pool import RankPool, model_parallel

KIND = "qwen3_moe, mixed"


def make(folder: Path, stored: str) -> Any:
    """A directory with experts one by one, as transformers writes them, or together."""
    from safetensors.torch import load_file, save_file

    from megatron.mimo.models import load_family

    family = load_family("llava")
    config: Any = family.tiny()
    use_text(KIND, config)
    torch.manual_seed(5)
    model: Any = family.reference(config)
    model.save_pretrained(folder)
    if stored == "single":
        return model
    path = folder / "model.safetensors"
    tensors = {name: one for name, one in load_file(path).items() if ".experts." not in name}
    for name, tensor in model.state_dict().items():
        if ".experts." in name:
            own = name.replace("model.language_model.", "language_model.model.")
            tensors[own] = tensor if stored == "stacked" else tensor.transpose(1, 2).contiguous()
    save_file(tensors, path, metadata={"format": "pt"})
    return model


def there_and_back(folder: Path, stored: str) -> dict[str, Any]:
    from megatron.mimo.convert.exporting import export_model
    from megatron.mimo.convert.importing import import_model
    from megatron.mimo.convert.verify import verify_checkpoint

    hf, mimo, back, half = (folder / name for name in ("hf", "mimo", "back", "half"))
    make(hf, stored)
    import_model(hf, mimo, shown=False)
    export_model(mimo, back, shown=False)
    export_model(mimo, half, dtype=torch.bfloat16, shown=False)
    # transformers has no conversion of the transposed ones for this family, so reads none
    only = stored == "transposed"
    findings = verify_checkpoint(hf, mimo, weights_only=only)
    return {
        "same": same_files(hf, back),
        "wrong": [str(one) for one in findings if not one.equal],
        "half": (half / "model.safetensors").stat().st_size
        / (hf / "model.safetensors").stat().st_size,
    }


@pytest.mark.parametrize("stored", ["single", "stacked", "transposed"])
def test_experts_come_back_as_they_were(ranks: RankPool, tmp_path: Path, stored: str) -> None:
    (found,) = ranks(1)(there_and_back, tmp_path, stored)
    assert found["wrong"] == []
    assert found["same"]
    assert 0.4 < found["half"] < 0.6


def perturb(folder: Path) -> list[str]:
    """An expert of the stacked weights with another value; then two experts exchanged."""
    from safetensors.torch import load_file, save_file

    from megatron.mimo.convert.importing import import_model
    from megatron.mimo.convert.verify import verify_checkpoint

    make(folder / "hf", "stacked")
    import_model(folder / "hf", folder / "mimo", shown=False)
    path = folder / "hf/model.safetensors"
    tensors, rows = load_file(path), []
    name = "language_model.model.layers.1.mlp.experts.down_proj"
    tensors[name][2, 3, 4] += 1e-3
    for _ in range(2):
        save_file(tensors, path, metadata={"format": "pt"})
        findings = verify_checkpoint(folder / "hf", folder / "mimo", weights_only=True)
        rows.append("\n".join(str(one) for one in findings if not one.equal))
        tensors[name] = tensors[name][[1, 0, 2, 3]].clone()
    return rows


def test_verify_names_the_expert(ranks: RankPool, tmp_path: Path) -> None:
    (found,) = ranks(1)(perturb, tmp_path)
    one, two = found
    name = "language_model.model.layers.1.mlp.experts.down_proj"
    assert f"{name}[2]: largest difference 1.0" in one
    assert f"{name}[0]" not in one
    assert f"{name}[0]" in two
    assert f"{name}[1]" in two


def load(folder: Path, sizes: dict[str, Any]) -> dict[str, float]:
    """What this rank holds of an imported checkpoint, against the weights in memory."""
    from megatron.mimo.arguments.standalone import build_model, model_settings
    from megatron.mimo.checkpoints.weights import load_hugging_face, load_weights
    from megatron.mimo.models import load_family, read_hf_config

    model_parallel(**sizes)
    family, config = load_family("llava"), read_hf_config(folder / "hf")
    changes = {
        "sequence_parallel": sizes.get("tp", 1) > 1,
        "expert_model_parallel_size": sizes.get("ep", 1),
        "expert_tensor_parallel_size": sizes.get("etp"),
    }
    settings = model_settings(
        family, config, tp_size=sizes.get("tp", 1), pp_size=sizes.get("pp", 1), changes=changes
    )
    models = [build_model(family, config, settings, device=torch.device("cpu")) for _ in "12"]
    load_weights(models[0], folder / "mimo/release")
    reference = family.reference(config).from_pretrained(folder / "hf")
    load_hugging_face(models[1], reference.state_dict(), family.keys(config))
    others = dict(models[1].named_parameters())
    return {
        name: (one - others[name]).abs().max().item() for name, one in models[0].named_parameters()
    }


def import_to(folder: Path) -> None:
    from megatron.mimo.convert.importing import import_model

    make(folder / "hf", "stacked")
    import_model(folder / "hf", folder / "mimo", shown=False)


@pytest.fixture(scope="module")
def stacked(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stacked")
    ranks(1)(import_to, folder)
    return folder


@pytest.mark.parametrize(
    "sizes",
    [{"ep": 2}, {"tp": 2, "ep": 2, "etp": 1}, {"tp": 2, "etp": 2}, {"pp": 2}],
    ids=str,
)
def test_a_checkpoint_loads_under_any_layout(
    ranks: RankPool, stacked: Path, sizes: dict[str, Any]
) -> None:
    found = ranks(2)(load, stacked, sizes)
    held = set().union(*(one.keys() for one in found))
    assert any("local_experts.0" in name for name in held)
    assert {name: error for one in found for name, error in one.items() if error} == {}
