"""Rules and narrowed draws against transformers' own processors of scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.generation import logits_process as theirs

from megatron.core.models.mimo.errors import ConfigError, UnsupportedError
from megatron.mimo.inference.rules import Rules, apply_rules
from megatron.mimo.inference.sampling import SamplingOptions, choose_tokens
from megatron.mimo.inference.settings import Settings, read_rules, read_settings
from megatron.mimo.models import load_family

WORDS = 30
EOS = (2,)


def processors(name: str, prompt: int) -> Any:
    eos = torch.tensor(EOS)
    return {
        "repetition_penalty": theirs.RepetitionPenaltyLogitsProcessor(1.3),
        "no_repeat_ngram_size": theirs.NoRepeatNGramLogitsProcessor(2),
        "bad_words": theirs.NoBadWordsLogitsProcessor([[5], [6, 7], [2]], eos_token_id=eos),
        "suppress_tokens": theirs.SuppressTokensLogitsProcessor([4, 9]),
        "begin_suppress_tokens": theirs.SuppressTokensAtBeginLogitsProcessor([8, 2], prompt),
        "min_new_tokens": theirs.MinNewTokensLengthLogitsProcessor(prompt, 3, eos, device="cpu"),
    }[name]


RULES: dict[str, Any] = {
    "repetition_penalty": 1.3,
    "no_repeat_ngram_size": 2,
    "bad_words": ((5,), (6, 7), (2,)),
    "suppress_tokens": (4, 9),
    "begin_suppress_tokens": (8, 2),
    "min_new_tokens": 3,
}


@pytest.mark.parametrize("name", RULES)
def test_each_rule_is_that_of_transformers(name: str) -> None:
    generator = torch.Generator().manual_seed(4)
    changed = False
    for length in (1, 2, 5, 12, 40):
        for answered in (0, 1, 2, 4):
            ids_L = torch.randint(0, 10, (length + answered,), generator=generator)
            ids_L[-1] = 6
            scores_1V = torch.randn(1, WORDS, generator=generator)
            want_1V = processors(name, length)(ids_L[None], scores_1V.clone())
            got_1V = apply_rules(
                scores_1V,
                Rules(**{name: RULES[name]}),
                prompts=[ids_L[:length].tolist()],
                answers=[ids_L[length:].tolist()],
                stop_tokens=EOS,
            )
            assert torch.equal(got_1V, want_1V)
            changed |= not torch.equal(got_1V, scores_1V)
    assert changed


def test_all_rules_at_once() -> None:
    generator = torch.Generator().manual_seed(5)
    ids_L = torch.randint(0, 10, (20,), generator=generator)
    scores_1V = want_1V = torch.randn(1, WORDS, generator=generator)
    for name in RULES:
        want_1V = processors(name, 18)(ids_L[None], want_1V.clone())
    got_1V = apply_rules(
        scores_1V,
        Rules(**RULES),
        prompts=[ids_L[:18].tolist()],
        answers=[ids_L[18:].tolist()],
        stop_tokens=EOS,
    )
    assert torch.equal(got_1V, want_1V)


@pytest.mark.parametrize(
    "narrow",
    [
        {"top_k": 5},
        {"top_p": 0.7},
        {"min_p": 0.2},
        {"top_k": 6, "top_p": 0.6},
        {"top_k": 12, "top_p": 0.9, "min_p": 0.1},
    ],
)
def test_what_can_be_drawn_is_what_transformers_can_draw(narrow: dict[str, Any]) -> None:
    scores_1V = torch.randn(1, WORDS, generator=torch.Generator().manual_seed(6)) * 2
    left_1V = scores_1V / 0.8
    for name, processor in (
        ("top_k", theirs.TopKLogitsWarper),
        ("top_p", theirs.TopPLogitsWarper),
        ("min_p", theirs.MinPLogitsWarper),
    ):
        if name in narrow:
            left_1V = processor(narrow[name])(torch.zeros(1, 1, dtype=torch.long), left_1V)
    want_V = torch.softmax(left_1V[0].double(), dim=0)
    draws = 20_000
    uniforms_B = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    options = SamplingOptions(temperature=0.8, **narrow)
    tokens_B = choose_tokens(scores_1V.expand(draws, -1), options, uniforms_B)
    got_V = torch.bincount(tokens_B, minlength=WORDS).double() / draws
    assert torch.equal(got_V > 0, want_V > 0)
    torch.testing.assert_close(got_V, want_V, rtol=0, atol=2 / draws)


def settings_of(folder: Path, **given: Any) -> Settings:
    (folder / "generation_config.json").write_text(json.dumps(given))
    return read_settings(folder, load_family("llava").tiny())


def test_a_published_file(tmp_path: Path) -> None:
    found = settings_of(
        tmp_path,
        do_sample=True,
        eos_token_id=[2, 0],
        pad_token_id=0,
        repetition_penalty=1.05,
        temperature=1e-6,
    )
    assert found.stop_tokens == (0, 2)
    assert found.options.temperature == 1e-6
    assert found.options.top_k == 50  # which transformers fills in
    assert found.options.rules == Rules(repetition_penalty=1.05)
    assert read_rules(tmp_path) == Rules(repetition_penalty=1.05)


def test_every_rule_has_a_field_of_the_file(tmp_path: Path) -> None:
    found = settings_of(
        tmp_path,
        max_new_tokens=7,
        bad_words_ids=[[5], [6, 7], [2]],
        **{name: value for name, value in RULES.items() if name != "bad_words"},
    )
    assert found.options.rules == Rules(**RULES)
    assert (found.options.max_new_tokens, found.options.temperature) == (7, 0.0)
    sampled = settings_of(tmp_path, do_sample=True, top_p=0.9, top_k=3, min_p=0.1).options
    assert (sampled.top_p, sampled.top_k, sampled.min_p) == (0.9, 3, 0.1)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"num_beams": 3}, UnsupportedError, "num_beams is 3, which is not supported; expected 1"),
        ({"penalty_alpha": 0.6}, UnsupportedError, "penalty_alpha is 0.6"),
        ({"guidance_scale": 1.5}, UnsupportedError, "guidance_scale is 1.5"),
        ({"repetition_penalty": 0.0}, ConfigError, "repetition_penalty is 0.0; expected more"),
        ({"min_new_tokens": -1}, ConfigError, "min_new_tokens is -1"),
        ({"bad_words_ids": [[]]}, ConfigError, "bad_words has an empty entry"),
    ],
)
def test_what_is_not_supported_is_named(
    tmp_path: Path, given: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        settings_of(tmp_path, **given)


def test_a_damaged_file(tmp_path: Path) -> None:
    config = load_family("llava").tiny()
    for text, words in (("{", "is not JSON"), ("[]", "holds a list")):
        (tmp_path / "generation_config.json").write_text(text)
        with pytest.raises(ConfigError, match=words):
            read_settings(tmp_path, config)


def test_ends_of_config_json_alone(tmp_path: Path) -> None:
    from transformers import GenerationConfig

    config = load_family("llava").tiny()
    config.text_config.eos_token_id = [2, 77]
    assert GenerationConfig.from_model_config(config).eos_token_id == [2, 77]
    assert read_settings(tmp_path, config).stop_tokens == (2, 77)
