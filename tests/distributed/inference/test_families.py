"""The same tokens as transformers' ``generate``, for every family's tiny model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.mimo.models import family_names
from tests.distributed.models.text_kinds import with_text
from tests.rank_pool import RankPool, model_parallel
from tests.tiers import crossed, some

NEW_TOKENS = 32
LAYOUTS = {"dp2": (1, 1), "tp2": (2, 1), "pp2": (1, 2)}

Change = Callable[[Any], None]
Reference = tuple[Any, dict[str, Tensor], list[dict[str, Tensor]], list[list[int]]]


def answer_by_transformers(name: str, change: Change | None = None) -> Reference:
    """Configuration, weights, prompts, and greedy answers one prompt at a time."""
    from megatron.mimo.models import load_family

    family = load_family(name)
    config = family.tiny()
    if change is not None:
        change(config)
    torch.manual_seed(3)
    model = family.reference(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # answers that repeat one token prove little
            parameter += 0.05 * torch.randn_like(parameter)
    generator = torch.Generator().manual_seed(4)
    examples = [family.example(config, generator) for _ in range(3)]
    for example in examples:  # slow videos, whose frames are at larger positions than what follows
        if "second_per_grid_ts" in example:
            example["second_per_grid_ts"] = example["second_per_grid_ts"] * 20
    placeholders = sorted(family.media(config).special_token_ids.values())
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    answers = []
    for example in examples:
        whole = model.generate(
            **example, do_sample=False, max_new_tokens=NEW_TOKENS, suppress_tokens=placeholders
        )
        answers.append(whole[0, example["input_ids"].size(1) :].tolist())
    weights = {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}
    return config, weights, examples, answers


def generate(name: str, reference: Reference, layouts: Sequence[str] = tuple(LAYOUTS)) -> None:
    """All prompts together, under one layout after the other."""
    from megatron.core import parallel_state
    from megatron.mimo.arguments.standalone import build_model, model_settings
    from megatron.mimo.checkpoints.weights import load_hugging_face
    from megatron.mimo.data import SampleCollator
    from megatron.mimo.inference import Generator, SamplingOptions
    from megatron.mimo.models import load_family

    config, weights, examples, expected = reference
    family = load_family(name)
    prompts = [family.sample(config, example) for example in examples]
    assert len({len(prompt.token_ids) for prompt in prompts}) > 1
    media = family.media(config)
    for layout in layouts:
        tp, pp = LAYOUTS[layout]
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        model_parallel(tp=tp, pp=pp)
        # experts cut by tensor parallelism need it
        changes = {"sequence_parallel": tp > 1 and "num_experts" in family.arguments(config)}
        settings = model_settings(family, config, tp_size=tp, pp_size=pp, changes=changes)
        model = build_model(family, config, settings, device=torch.device("cpu"))
        load_hugging_face(model, weights, family.keys(config))
        collate = SampleCollator(
            seq_length=settings.max_positions,
            vocab_size=settings.tokens,
            pad_id=0,
            special_token_ids=media.special_token_ids,
            media_formats=media.formats,
            mrope=media.mrope,
            span_modalities=media.spans,
        )
        generator = Generator(model, collate, vocab_size=settings.tokens)
        assert generator(prompts, SamplingOptions(max_new_tokens=NEW_TOKENS)) == expected, layout


@pytest.mark.parametrize(
    "name", some(["mistral, windows", "qwen2, windows", "gemma3", "qwen3_moe"], "mistral, windows")
)
def test_kinds_of_language_models_say_it_too(ranks: RankPool, name: str) -> None:
    (reference,) = ranks(1)(answer_by_transformers, "llava", with_text(name))
    assert len({token for answer in reference[3] for token in answer}) > 8
    ranks(2)(generate, "llava", reference)


@pytest.fixture(scope="module")
def reference(ranks: RankPool) -> Callable[[str], Reference]:
    return cache(lambda name: ranks(1)(answer_by_transformers, name)[0])


@pytest.mark.parametrize(("name", "layout"), crossed(family_names(), ("tp2", "pp2", "dp2")))
def test_says_what_transformers_says(
    ranks: RankPool, reference: Callable[[str], Reference], name: str, layout: str
) -> None:
    wanted = reference(name)
    assert len({token for answer in wanted[3] for token in answer}) > 8
    ranks(2)(generate, name, wanted, [layout])
