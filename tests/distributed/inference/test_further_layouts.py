"""Answers of Qwen3-VL and Qwen3.5 under further layouts: cut sequences, experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed.inference.test_families import (
    NEW_TOKENS,
    Reference,
    answer_by_transformers,
)
from tests.rank_pool import RankPool, model_parallel
from tests.tiers import some

CUT = {"sequence_parallel": True}
LAYOUTS: dict[str, tuple[dict[str, int], dict[str, object]]] = {
    "cp2": ({"cp": 2}, {"context_parallel_size": 2}),
    "tp2-sp": ({"tp": 2}, CUT),
}
OF_EXPERTS: dict[str, tuple[dict[str, int], dict[str, object]]] = {
    "ep2": ({"ep": 2}, {"expert_model_parallel_size": 2}),
}


def answer(name: str, reference: Reference) -> dict[str, list[list[int]]]:
    """Answers to all prompts, images and clips among them, in one batch of uneven lengths."""
    from megatron.core import parallel_state
    from megatron.mimo.arguments.standalone import build_model, model_settings
    from megatron.mimo.checkpoints.weights import load_hugging_face
    from megatron.mimo.inference import Generator, SamplingOptions
    from megatron.mimo.models import load_family
    from megatron.mimo.models.common.family import sample_collator

    config, weights, examples, _ = reference
    family: Any = load_family(name)
    prompts = [family.sample(config, example) for example in examples]
    answers = {}
    for layout, (sizes, changes) in (LAYOUTS | (OF_EXPERTS if "moe" in name else {})).items():
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        model_parallel(**sizes)
        tp = sizes.get("tp", 1)
        settings = model_settings(family, config, tp_size=tp, changes=changes)
        model = build_model(family, config, settings, device=torch.device("cpu"))
        load_hugging_face(model, weights, family.keys(config))
        collate = sample_collator(
            family, config, seq_length=settings.max_positions, vocab_size=settings.tokens
        )
        generator = Generator(model, collate, vocab_size=settings.tokens)
        answers[layout] = generator(prompts, SamplingOptions(max_new_tokens=NEW_TOKENS))
    return answers


@pytest.mark.parametrize("name", some(["qwen3_vl", "qwen3_vl_moe", "qwen3_5_moe"], "qwen3_vl"))
def test_says_what_transformers_says(ranks: RankPool, name: str) -> None:
    (reference,) = ranks(1)(answer_by_transformers, name)
    assert any("pixel_values_videos" in example for example in reference[2])
    for answers in ranks(2)(answer, name, reference):
        for layout, found in answers.items():
            assert found == reference[3], layout
