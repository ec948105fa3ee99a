"""Adapters as tensors: names, merging, PEFT's format; no process group."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron.core.models.mimo.errors import ConfigError, InputError
from megatron.mimo.lora import (
    LoraSettings,
    adapter_names,
    export_adapters,
    is_adapter,
    merge_adapter,
    peft_tensors,
    weight_name,
)
from megatron.mimo.models.common.keys import Concatenated, FusedQKV, KeyEntry, KeyTable

QKV = FusedQKV(heads=4, groups=2, head_size=3)
TABLE = KeyTable(
    entries=(
        KeyEntry(
            mimo="a.linear_qkv.weight", hf=("q.weight", "k.weight", "v.weight"), transform=QKV
        ),
        KeyEntry(
            mimo="a.linear_fc1.weight", hf=("gate.weight", "up.weight"), transform=Concatenated()
        ),
        KeyEntry(mimo="a.linear_proj.weight", hf=("o.weight",)),
    )
)
NAMES = {name: f"inside.{name}" for row in TABLE.entries for name in row.hf}
SETTINGS = LoraSettings(modules=("language",), rank=2, alpha=8.0)


def _tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"linear_qkv": (24, 12), "linear_fc1": (10, 12), "linear_proj": (12, 12)}
    tensors = {}
    for name, (outputs, inputs) in shapes.items():
        weight = f"a.{name}.weight"
        down, up = adapter_names(weight)
        tensors[weight] = torch.randn(outputs, inputs, generator=generator)
        tensors[down] = torch.randn(2, inputs, generator=generator)
        tensors[up] = torch.randn(outputs, 2, generator=generator)
    return tensors


def test_names() -> None:
    down, up = adapter_names("language_model.x.linear_qkv.weight")
    assert is_adapter(down)
    assert is_adapter(up)
    assert weight_name(down) == weight_name(up) == "language_model.x.linear_qkv.weight"
    assert not is_adapter("language_model.x.linear_qkv.weight")
    assert not is_adapter("language_model.adapter.weight")


def test_splitting_and_merging_agree() -> None:
    """PEFT's parts, merged weight by weight, are the weights of the merged parameter."""
    tensors = _tensors()
    parts = peft_tensors(TABLE, tensors, NAMES)
    for row in TABLE.entries:
        down, up = (tensors[name] for name in adapter_names(row.mimo))
        merged = merge_adapter(tensors[row.mimo], down, up, SETTINGS.scale)
        before = row.transform.to_hf(tensors[row.mimo])
        after = row.transform.to_hf(merged)
        for name, old, new in zip(row.hf, before, after, strict=True):
            module = f"base_model.model.inside.{name.removesuffix('.weight')}"
            lora_a, lora_b = (parts[f"{module}.lora_{half}.weight"] for half in "AB")
            torch.testing.assert_close(new, old + 4.0 * lora_b @ lora_a)


def test_merging_keeps_the_dtype_and_adds_in_fp32() -> None:
    weight = torch.ones(2, 2, dtype=torch.bfloat16)
    merged = merge_adapter(weight, torch.full((1, 2), 2.0), torch.ones(2, 1), 0.5)
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged, torch.full((2, 2), 2.0, dtype=torch.bfloat16))


def test_files(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    export_adapters(TABLE, _tensors(), SETTINGS, tmp_path, names=NAMES, base_model="some/model")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == 2
    assert config["lora_alpha"] == 8.0
    assert config["base_model_name_or_path"] == "some/model"
    assert config["target_modules"] == sorted(
        f"inside.{name}" for name in ("q", "k", "v", "gate", "up", "o")
    )
    written = load_file(tmp_path / "adapter_model.safetensors")
    expected = peft_tensors(TABLE, _tensors(), NAMES)
    assert set(written) == set(expected)
    assert all(torch.equal(written[name], expected[name]) for name in expected)


def test_what_is_trained_without_adapters_goes_along(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    more = (KeyEntry(mimo="bias", hf=("o.bias",)), KeyEntry(mimo="newline", hf=("newline",)))
    table = KeyTable(entries=(*TABLE.entries, *more))
    names = NAMES | {"o.bias": "inside.o.bias", "newline": "inside.newline"}
    tensors = _tensors()
    trained = {"bias": torch.ones(12), "newline": torch.ones(3)}
    left_out = export_adapters(table, tensors, SETTINGS, tmp_path, names=names, trained=trained)
    assert left_out == ["inside.newline"]
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["inside.o"]
    written = load_file(tmp_path / "adapter_model.safetensors")
    assert torch.equal(written["base_model.model.inside.o.bias"], trained["bias"])
    assert not [name for name in written if "newline" in name]


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there are no adapters to export; train with --lora"):
        export_adapters(TABLE, {"a.linear_qkv.weight": torch.ones(1)}, SETTINGS, tmp_path, names={})
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match=r"adapter of b\.linear\.weight cannot be exported"):
        peft_tensors(TABLE, {"b.linear.adapter.up": torch.ones(1, 1)}, NAMES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "--lora-rank 0: must be at least 1"),
        ({"alpha": 0.0}, "--lora-alpha 0.0: must be larger"),
        ({"dropout": 1.0}, "--lora-dropout 1.0: must be at least 0"),
        ({"modules": ()}, "expected at least one of each"),
        ({"targets": ()}, "expected at least one of each"),
    ],
)
def test_settings_out_of_range(changes: dict[str, object], message: str) -> None:
    given: dict[str, object] = {"modules": ("language",), **changes}
    with pytest.raises(ConfigError, match=message):
        LoraSettings(**given)  # type: ignore[arg-type]
