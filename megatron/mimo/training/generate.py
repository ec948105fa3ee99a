"""The generation that an evaluation at the end of training calls: ``FinishedRun.generate``."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from megatron.mimo.inference import Generator, SamplingOptions
from megatron.mimo.recipes.recipe import Collator

if TYPE_CHECKING:
    from megatron.core.models.mimo import MimoModel
    from megatron.mimo.data.sample import Sample

__all__ = ["greedy_generation"]

_MICRO_BATCHES_AT_ONCE = 8  # held in memory together on each data-parallel rank


def greedy_generation(
    args: Namespace, chunks: Sequence[MimoModel], collate: Collator
) -> Callable[[Sequence[Sample], int, int | None], list[list[int]]]:
    """Greedy decoding with the training model: ``generate(samples, max_new_tokens, stop_token)``.

    It is collective: all ranks call it with the same samples and get all answers, without prompts
    and stop tokens. The model is not shown a sample from its first label on. With ``stop_token``
    None every answer has ``max_new_tokens``.

    Args:
        args: of the run.
        chunks: this rank's part of the model.
        collate: the recipe's.
    """
    generator = Generator(
        chunks,
        collate,
        vocab_size=args.vocab_size,
        max_length=args.seq_length,
        batch_size=max(
            1,
            args.eval_micro_batch_size
            * _MICRO_BATCHES_AT_ONCE
            // args.pipeline_model_parallel_size,
        ),
        use_cache=not args.multi_latent_attention,
    )

    def generate(
        samples: Sequence[Sample], max_new_tokens: int, stop_token: int | None
    ) -> list[list[int]]:
        options = SamplingOptions(
            max_new_tokens=max_new_tokens,
            stop_tokens=() if stop_token is None else (stop_token,),
        )
        return generator([sample.prompt() for sample in samples], options)

    return generate
