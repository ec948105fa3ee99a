"""Rows that pad a vocabulary have no probability, wherever tensor parallelism puts them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.rank_pool import RankPool, model_parallel


def build_family(tp: int, multiple: int) -> tuple[Any, int]:
    """A model of a family, outside of a run, and its vocabulary."""
    from megatron.mimo.arguments.standalone import build_model, model_settings
    from megatron.mimo.models import load_family

    family = load_family("llava")
    config = family.tiny()
    changes = {"make_vocab_size_divisible_by": multiple}
    settings = model_settings(family, config, tp_size=tp, changes=changes)
    return build_model(family, config, settings, device=torch.device("cpu")), 500


def build_tied(tp: int, multiple: int) -> tuple[Any, int]:
    return build_recipe(tp, multiple, untie_embeddings_and_output_weights=False)


def build_recipe(tp: int, multiple: int, *flags: str, **config: object) -> tuple[Any, int]:
    """A run's model, of a recipe that describes a plain GPTModel, and its vocabulary."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.mimo.arguments.command_line import parse_arguments
    from megatron.mimo.backend.capabilities import capabilities
    from megatron.mimo.recipes import load_recipe
    from megatron.mimo.training.model import ModelBuilder
    from megatron.training.models.gpt import calculate_padded_vocab_size

    recipe = load_recipe("digits")
    layout = ("--tensor-model-parallel-size", str(tp), "--no-output")
    size = f"--make-vocab-size-divisible-by={multiple}"
    args = parse_arguments(
        recipe,
        machine=capabilities(),
        config=config,
        argv=(*layout, size, *flags),
    )
    args.padded_vocab_size = calculate_padded_vocab_size(args.vocab_size, multiple, tp)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return ModelBuilder(recipe, args)(pg_collection=groups), 33


def hidden_tokens(build: Any, tp: int, multiple: int, *flags: str) -> tuple[list[bool], bool, int]:
    """Which of this rank's logits are the least number, whether their rows are trained, and the
    size of the vocabulary."""
    groups = model_parallel(tp=tp)
    model, vocabulary = build(tp, multiple, *flags)
    ids_BS = torch.randint(5, vocabulary, (2, 6), generator=torch.Generator().manual_seed(0))
    positions_BS = torch.arange(6).expand(2, -1)
    logits_BSV, _ = model(ids_BS, positions_BS)
    is_least = logits_BSV == torch.finfo(logits_BSV.dtype).min
    hidden_V = is_least.all(dim=(0, 1))
    assert hidden_V.equal(is_least.any(dim=0).any(dim=0))
    losses_BS, _ = model(ids_BS, positions_BS, labels=ids_BS)
    words_BSV = gather(logits_BSV.detach(), groups.tp)[..., :vocabulary]
    expected_BS = torch.nn.functional.cross_entropy(
        words_BSV.flatten(0, 1), ids_BS.flatten(), reduction="none"
    )
    torch.testing.assert_close(losses_BS.flatten(), expected_BS)
    losses_BS.sum().backward()
    language = model.language_model
    output = language.output_layer.weight
    if language.share_embeddings_and_output_weights:
        output = language.shared_embedding_or_output_weight()
    return hidden_V.tolist(), bool(output.grad[hidden_V].any()), vocabulary


def gather(logits_BSV: torch.Tensor, group: Any) -> torch.Tensor:
    parts = [torch.empty_like(logits_BSV) for _ in range(group.size())]
    torch.distributed.all_gather(parts, logits_BSV.contiguous(), group=group)
    return torch.cat(parts, dim=-1)


FUSED = "--cross-entropy-loss-fusion"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "tp", "multiple", "flags"),
    [
        (build_family, 1, 8, ()),
        (build_family, 2, 8, ()),
        (build_family, 2, 512, ()),
        (build_recipe, 1, 8, ()),
        (build_recipe, 2, 8, ()),
        (build_recipe, 2, 128, (FUSED,)),
        (build_tied, 2, 8, ()),
        (build_recipe, 1, 11, ()),  # no padding
    ],
)
def test_padding_of_the_vocabulary_has_no_probability(
    ranks: RankPool, build: Any, tp: int, multiple: int, flags: tuple[str, ...]
) -> None:
    found = ranks(tp)(hidden_tokens, build, tp, multiple, *flags)
    hidden = [flag for flags, _, _ in found for flag in flags]
    vocabulary = found[0][2]
    assert hidden == [False] * vocabulary + [True] * (len(hidden) - vocabulary)
    assert len(hidden) == -(-vocabulary // (multiple * tp)) * multiple * tp
    assert not any(is_trained for _, is_trained, _ in found)


def hide_twice() -> tuple[int, str]:
    """Hooks after a second call, and what a loss without logits is told."""
    from megatron.core.models.mimo.errors import ConfigError
    from megatron.mimo.models.common.vocabulary import leave_out_padding

    groups = model_parallel()
    model, _ = build_recipe(1, 8)
    language = model.language_model
    leave_out_padding(language, tokens=33, rows=40, tp_group=groups.tp)
    hooks = len(language.output_layer._forward_hooks)
    language.output_layer._forward_hooks.clear()
    language.config.cross_entropy_loss_fusion = True
    language.config.cross_entropy_fusion_impl = "linear"
    with pytest.raises(ConfigError) as refused:
        leave_out_padding(language, tokens=33, rows=40, tp_group=groups.tp)
    return hooks, str(refused.value)


def test_padding_is_hidden_once_or_refused(ranks: RankPool) -> None:
    ((hooks, message),) = ranks(1)(hide_twice)
    assert hooks == 1
    assert "33 tokens padded to 40: this loss has no logits" in message
