"""Rows that pad a vocabulary have no probability, wherever tensor parallelism puts them."""

from __future__ import annotations

import pytest
import torch

from tests.rank_pool import RankPool, model_parallel


def hidden_tokens(tp: int, multiple: int) -> tuple[list[bool], bool]:
    """Which of this rank's logits are the least number, and whether their rows are trained."""
    from megatron.mimo.models import load_family
    from megatron.mimo.models.standalone import build_model, model_arguments

    model_parallel(tp=tp)
    family = load_family("llava")
    config = family.tiny()
    flags = [f"--make-vocab-size-divisible-by={multiple}"]
    args = model_arguments(family, config, tp_size=tp, flags=flags)
    model = build_model(family, config, args, device=torch.device("cpu"))
    ids_BS = torch.randint(5, 500, (2, 6))
    positions_BS = torch.arange(6).expand(2, -1)
    logits_BSV, _ = model(ids_BS, positions_BS)
    is_least = logits_BSV == torch.finfo(logits_BSV.dtype).min
    hidden_V = is_least.all(dim=(0, 1))
    assert hidden_V.equal(is_least.any(dim=0).any(dim=0))
    losses_BS, _ = model(ids_BS, positions_BS, labels=ids_BS)
    losses_BS.sum().backward()
    gradient_VH = model.language_model.output_layer.weight.grad
    return hidden_V.tolist(), bool(gradient_VH[hidden_V].any())


@pytest.mark.parametrize(("tp", "multiple"), [(1, 8), (2, 8), (2, 512)])
def test_padding_of_the_vocabulary_has_no_probability(
    ranks: RankPool, tp: int, multiple: int
) -> None:
    found = ranks(tp)(hidden_tokens, tp, multiple)
    hidden = [flag for flags, _ in found for flag in flags]
    assert hidden == [False] * 500 + [True] * (len(hidden) - 500)
    assert len(hidden) == -(-500 // (multiple * tp)) * multiple * tp
    assert not any(is_trained for _, is_trained in found)
