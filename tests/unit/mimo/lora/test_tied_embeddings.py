"""Adapters beside a tied, trained embedding, against PEFT."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.mimo.lora import LoraSettings, adapter_names, export_adapters
from megatron.mimo.lora.peft import module_names
from megatron.mimo.models import load_family


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_adapters_beside_a_tied_embedding_that_was_trained(name: str, tmp_path: Path) -> None:
    """Base and adapters in PEFT are the merged model: the output layer is the embedding's copy."""
    from peft import PeftModel

    family = load_family(name)
    config: Any = family.tiny()
    config.tie_word_embeddings = True
    torch.manual_seed(3)
    base: Any = family.reference(config).eval()
    with torch.device("meta"):
        names = module_names(family.reference(config))
    weight = "language_model.decoder.layers.0.mlp.linear_fc2.weight"
    down, up = adapter_names(weight)
    tensors = {down: torch.randn(4, 96), up: torch.randn(64, 4)}
    embedding = torch.randn(500, 64)
    settings = LoraSettings(modules=("language",), rank=4, alpha=8)
    trained = {"language_model.embedding.word_embeddings.weight": embedding}
    table = family.keys(config)
    left_out = export_adapters(table, tensors, settings, tmp_path, names=names, trained=trained)
    assert left_out == []

    merged = copy.deepcopy(base)
    ids = torch.arange(20, 32)[None]
    with torch.no_grad():
        merged.get_input_embeddings().weight.copy_(embedding)
        (hf,) = (row.hf[0] for row in table.each() if row.mimo == weight)
        merged.get_parameter(names[hf]).add_(settings.scale * tensors[up] @ tensors[down])
        assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
        want = merged(input_ids=ids).logits
        before = base(input_ids=ids).logits
        got = PeftModel.from_pretrained(base, tmp_path).eval()(input_ids=ids).logits
    assert (want - before).abs().max() > 1
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
