"""What transformers computes for a family's tiny model: sample by sample, without padding.

Legend: L tokens of one sample, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Tensors = dict[str, Tensor]

STEPS = 10  # of AdamW
LEARNING_RATE, BETAS, EPSILON, WEIGHT_DECAY, CLIP = 2e-3, (0.9, 0.95), 1e-8, 0.1, 1.0


@dataclass(frozen=True, kw_only=True)
class Expected:
    """Of the Hugging Face model; everything by its own names.

    Attributes:
        config: of the model.
        weights: its state dict.
        examples: conversations in Hugging Face's form.
        logits: [L, V] of each.
        loss: mean over the labels of all of them.
        gradients: of the loss, for every parameter that it depends on.
        trained_parameters: our names of these.
        trained: losses of steps of AdamW, one batch of all examples each; empty if not asked for.
    """

    config: Any
    weights: Tensors
    examples: list[Tensors]
    logits: list[Tensor]
    loss: float
    gradients: Tensors
    trained_parameters: set[str]
    trained: list[float]


def compute_expected(
    name: str,
    change: Callable[[Any], None] | None = None,
    *,
    samples: int = 4,
    text_only: bool = False,
    train: bool = False,
) -> Expected:
    """Run it on a pool of one rank, whose processes have Megatron imported.

    Args:
        name: of the family.
        change: changes the tiny configuration in place.
        samples: how many random conversations.
        text_only: put three more among them that have no media: beside one with media, and two
            that make a micro-batch of two.
        train: compute ``trained`` as well.
    """
    from megatron.mimo.models import load_family

    family = load_family(name)
    config = family.tiny()
    if change is not None:
        change(config)
    torch.manual_seed(1)
    model = family.reference(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.requires_grad and parameter.dim() == 1:
                # biases begin at 0, norms at 1: hide no mistake
                parameter += 0.1 * torch.randn_like(parameter)
            if key.endswith("A_log"):  # of a fast decay fp32 leaves the gradient few digits
                parameter -= 2.0
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    generator = torch.Generator().manual_seed(2)
    examples = [family.example(config, generator) for _ in range(samples)]
    if text_only:
        texts = [_text(config, generator) for _ in range(3)]
        examples = [examples[0], texts[0], *examples[1:3], *texts[1:], *examples[3:]]
    labels = [family.sample(config, example).is_label for example in examples]
    loss, logits = mean_loss(model, examples, labels)
    loss.backward()
    gradients = {
        key: parameter.grad.clone()
        for key, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.grad is not None
    }
    return Expected(
        config=config,
        weights=weights,
        examples=examples,
        logits=logits,
        loss=loss.item(),
        gradients=gradients,
        trained_parameters=_our_names(family.keys(config), gradients),
        trained=_train(model, examples, labels) if train else [],
    )


def _text(config: Any, generator: torch.Generator) -> Tensors:
    """A conversation without media, and without tokens that stand for anything but text."""
    text = config.get_text_config()
    special = {
        value
        for part in (config, text)
        for key, value in part.to_dict().items()
        if key.endswith(("token_id", "token_index")) and isinstance(value, int)
    }
    plain = torch.tensor([token for token in range(text.vocab_size) if token not in special])
    length = int(torch.randint(6, 12, (), generator=generator))
    return {"input_ids": plain[torch.randint(len(plain), (1, length), generator=generator)]}


def _our_names(table: Any, gradients: Tensors) -> set[str]:
    gradients, table = table.laid_out(gradients)
    given = {table.canonical(name) for name in gradients}
    return {row.mimo for row in table.each() if given & set(row.hf)}


def mean_loss(
    model: nn.Module, examples: Sequence[Tensors], labels: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """The mean loss over all label positions, and the logits [L, V] of each example."""
    logits = [model(**example).logits[0] for example in examples]
    total = torch.zeros(())
    for logits_LV, example, is_label_L in zip(logits, examples, labels, strict=True):
        losses_L = F.cross_entropy(
            logits_LV[:-1].float(), example["input_ids"][0, 1:], reduction="none"
        )
        total = total + losses_L[is_label_L[1:]].sum()
    count = sum(int(is_label_L[1:].sum()) for is_label_L in labels)
    return total / count, [logits_LV.detach() for logits_LV in logits]


def _train(model: nn.Module, examples: Sequence[Tensors], labels: Sequence[Tensor]) -> list[float]:
    """A plain loop of AdamW; as in Megatron, vectors do not decay."""
    used = [parameter for parameter in model.parameters() if parameter.grad is not None]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in used if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in used if p.dim() == 1], "weight_decay": 0.0},
        ],
        lr=LEARNING_RATE,
        betas=BETAS,
        eps=EPSILON,
    )
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss, _ = mean_loss(model, examples, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(used, CLIP)
        optimizer.step()
        losses.append(loss.item())
    return losses
