"""Computes with transformers what our model is compared with, from a directory's weights.

Legend: L tokens of one sample, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron.mimo.convert.conversations import covering_examples
from megatron.mimo.inference.rules import Rules

__all__ = ["NEW_TOKENS", "Expected", "compute_expected"]

NEW_TOKENS = 32

Conversation = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Expected:
    """Results of the Hugging Face model, in fp32, sample by sample; names are Hugging Face's.

    Attributes:
        examples: conversations, as its forward takes them.
        logits: float32 [L, V] of each.
        loss: mean over the label positions of all of them.
        gradients: of the loss, of every parameter that it depends on.
        fixed: names of parameters that the model does not train.
        answers: greedy continuations of each, ``NEW_TOKENS`` long.
        rules: that they keep to.
    """

    examples: list[Conversation]
    logits: list[Tensor]
    loss: float
    gradients: dict[str, Tensor]
    fixed: tuple[str, ...]
    answers: list[list[int]]
    rules: Rules


def compute_expected(
    model: nn.Module,
    family: Any,
    config: Any,
    *,
    samples: int,
    seed: int,
    rules: Rules | None = None,
) -> Expected:
    """Run the model on random conversations.

    Args:
        model: of transformers, in fp32 and evaluation mode; keeps its gradients.
        family: the model's.
        config: its configuration.
        samples: how many conversations at least.
        seed: of the conversations.
        rules: of the answers; none by default.
    """
    rules = rules or Rules()
    examples = covering_examples(family, config, samples=samples, seed=seed)
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    # The row of the padding token is trained where it stands in a text: docs/conversion.md.
    embedding.padding_idx = None
    is_label = [family.sample(config, example).is_label for example in examples]
    logits = [model(**example).logits[0] for example in examples]
    count = sum(int(flags_L[1:].sum()) for flags_L in is_label)
    total = sum(
        (
            _losses(logits_LV, example)[flags_L[1:]].sum()
            for logits_LV, example, flags_L in zip(logits, examples, is_label, strict=True)
        ),
        start=torch.zeros(()),
    )
    loss = total / count
    loss.backward()
    return Expected(
        examples=examples,
        logits=[logits_LV.detach() for logits_LV in logits],
        loss=loss.item(),
        gradients={
            name: parameter.grad
            for name, parameter in model.named_parameters(remove_duplicate=False)
            if parameter.grad is not None
        },
        fixed=tuple(
            name
            for name, parameter in model.named_parameters(remove_duplicate=False)
            if not parameter.requires_grad
        ),
        answers=_answers(
            model, examples, sorted(family.media(config).special_token_ids.values()), rules
        ),
        rules=rules,
    )


def _losses(logits_LV: Tensor, example: Conversation) -> Tensor:
    return F.cross_entropy(logits_LV[:-1].float(), example["input_ids"][0, 1:], reduction="none")


def _answers(
    model: Any, examples: Sequence[Conversation], placeholders: list[int], rules: Rules
) -> list[list[int]]:
    """Greedy answers without an end, and without placeholders, which a random model might say."""
    from transformers import GenerationConfig

    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        pad_token_id=0,
        repetition_penalty=rules.repetition_penalty,
        no_repeat_ngram_size=rules.no_repeat_ngram_size or None,
        bad_words_ids=[list(words) for words in rules.bad_words] or None,
        suppress_tokens=[*placeholders, *rules.suppress_tokens],
        begin_suppress_tokens=list(rules.begin_suppress_tokens) or None,
    )
    # Of its own file, only what is said here counts: transformers fills gaps from it.
    model.generation_config = GenerationConfig()
    answers = []
    for example in examples:
        whole = model.generate(
            **example,
            # without it, transformers hides every padding token of the prompt
            attention_mask=torch.ones_like(example["input_ids"]),
            generation_config=settings,
        )
        answers.append(whole[0, example["input_ids"].size(1) :].tolist())
    return answers
