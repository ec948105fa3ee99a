"""A plain GPT trained by stock ``megatron.training.pretrain``: the script that the tests run.

Nothing here knows about CPUs but ``select_backend`` in ``main``. Writes ``LOSS <loss> <tokens>`` on
every rank that computes one, and the numbers of threads and child processes at the end.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import psutil
import torch
from torch.utils.data import Dataset

VOCABULARY = 60


class RandomTokens(Dataset[dict[str, torch.Tensor]]):
    """Sample i is drawn with seed i."""

    def __init__(self, size: int, sequence: int) -> None:
        self._size = size
        self._sequence = sequence

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        tokens = torch.randint(0, VOCABULARY, (self._sequence + 1,), generator=generator)
        return {
            "tokens": tokens[:-1],
            "labels": tokens[1:],
            "positions": torch.arange(self._sequence),
        }


def datasets(sizes: tuple[int, int, int], vp_stage: int | None = None) -> list[RandomTokens]:
    from megatron.training import get_args

    return [RandomTokens(max(size, 8), get_args().seq_length) for size in sizes]


def model(
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: Any = None,
    pg_collection: Any = None,
) -> torch.nn.Module:
    from megatron.core.models.gpt import GPTModel
    from megatron.mimo.layers import language_layer_spec
    from megatron.training import get_args
    from megatron.training.arguments import core_transformer_config_from_args

    args = get_args()
    config = config or core_transformer_config_from_args(args)
    return GPTModel(
        config,
        language_layer_spec(config, vp_stage=vp_stage),
        args.padded_vocab_size,
        args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        vp_stage=vp_stage,
        pg_collection=pg_collection,
    )


def loss(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    total = output.sum()
    tokens = torch.tensor(output.numel(), dtype=torch.int)
    kind = "LOSS" if output.requires_grad else "EVALUATION"
    sys.stdout.write(f"{kind} {total.item()!r} {tokens.item()}\n")
    return total, tokens, {"lm loss": torch.stack([total.detach(), tokens.float()])}


def forward_step(data: Iterator[dict[str, torch.Tensor]] | None, gpt: torch.nn.Module) -> Any:
    from megatron.core import tensor_parallel

    batch = next(data) if data is not None else None
    batch = tensor_parallel.broadcast_data(["tokens", "labels", "positions"], batch, torch.int64)
    size = batch["tokens"].shape[1]
    mask = torch.ones(1, 1, size, size, dtype=torch.bool).triu(1)
    output = gpt(batch["tokens"], batch["positions"], mask, labels=batch["labels"])
    return output, partial(loss)


def main() -> None:
    from megatron.mimo.backend import select_backend

    select_backend("cpu")
    from megatron.mimo.layers import install_adam

    install_adam()
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    args = parse_and_validate_args(args_defaults={"tokenizer_type": "NullTokenizer"})
    container = pretrain_cfg_container_from_args(args)
    pretrain(container, datasets, ModelType.encoder_or_decoder, forward_step, model)
    torch.distributed.barrier()
    sys.stdout.write(f"THREADS {psutil.Process().num_threads()}\n")
    sys.stdout.write(f"CHILDREN {len(psutil.Process().children())}\n")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
