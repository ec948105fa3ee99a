"""Directories that say one thing twice, or in an old way: read as transformers reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.rank_pool import RankPool


def write(name: str, folder: Path, **fields: Any) -> dict[str, Any]:
    """A tiny model in one file; returns its weights as the file has them."""
    from safetensors.torch import load_file

    from megatron.mimo.models import load_family

    family = load_family(name)
    config: Any = family.tiny()
    for field, value in fields.items():
        setattr(config, field, value)
    torch.manual_seed(5)
    model: Any = family.reference(config)
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def two_that_are_tied(folder: Path) -> tuple[str, list[str], bool, list[str]]:
    """The file holds another output layer than the embedding that config.json ties it to."""
    from safetensors.torch import load_file, save_file
    from transformers import LlavaForConditionalGeneration

    from megatron.mimo.convert.exporting import export_model
    from megatron.mimo.convert.importing import import_model
    from megatron.mimo.convert.verify import verify_checkpoint

    tensors = write("llava", folder / "hf", tie_word_embeddings=True)
    head = "language_model.lm_head.weight"
    tensors[head] = torch.randn_like(tensors["language_model.model.embed_tokens.weight"])
    save_file(tensors, folder / "hf/model.safetensors", metadata={"format": "pt"})
    said = import_model(folder / "hf", folder / "mimo", shown=False)
    findings = [str(one) for one in verify_checkpoint(folder / "hf", folder / "mimo")]
    export_model(folder / "mimo", folder / "back", shown=False)
    back = load_file(folder / "back/model.safetensors")
    theirs: Any = LlavaForConditionalGeneration.from_pretrained(folder / "back")
    same = torch.equal(theirs.lm_head.weight, tensors[head])
    config = json.loads((folder / "mimo/hf/config.json").read_text())
    assert config["tie_word_embeddings"] is False
    return (
        said,
        findings,
        same,
        [name for name in tensors if not torch.equal(back[name], tensors[name])],
    )


def test_two_weights_where_the_configuration_ties_them(ranks: RankPool, tmp_path: Path) -> None:
    ((said, findings, same, different),) = ranks(1)(two_that_are_tied, tmp_path)
    assert "language_model.lm_head.weight differs from" in said
    assert "as in transformers, both are kept" in said
    assert all(line.startswith("ok") for line in findings), findings
    assert same
    assert different == []


def old_buffers(name: str, buffer: str, folder: Path) -> list[str]:
    from safetensors.torch import save_file

    from megatron.mimo.convert.importing import import_model
    from megatron.mimo.convert.verify import verify_checkpoint

    tensors = write(name, folder / "hf")
    tensors[buffer] = torch.rand(8)
    save_file(tensors, folder / "hf/model.safetensors", metadata={"format": "pt"})
    import_model(folder / "hf", folder / "mimo", shown=False)
    findings = verify_checkpoint(folder / "hf", folder / "mimo", weights_only=True)
    return [str(one) for one in findings]


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("llava", "language_model.model."),
        ("qwen2_audio", "language_model.model."),
        ("qwen2_5_vl", "model."),
    ],
)
def test_rotary_buffers_of_old_files_are_kept_aside(
    ranks: RankPool, tmp_path: Path, name: str, prefix: str
) -> None:
    buffer = f"{prefix}layers.0.self_attn.rotary_emb.inv_freq"
    (lines,) = ranks(1)(old_buffers, name, buffer, tmp_path)
    assert all(line.startswith("ok") for line in lines), lines


def test_a_language_model_that_ties_within_a_model() -> None:
    from megatron.mimo.models import load_family

    family = load_family("llava_avlm")
    content = family.tiny().to_dict()
    content["text_config"]["tie_word_embeddings"] = True
    config = type(family.tiny()).from_dict(content)
    model: Any = family.reference(config)
    assert model.language_model.lm_head.weight is model.get_input_embeddings().weight
    assert config.tie_word_embeddings
    assert family.arguments(config)["untie_embeddings_and_output_weights"] is False
