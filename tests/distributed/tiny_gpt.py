"""A GPT small enough for tests, under tensor, sequence and data parallelism."""

from __future__ import annotations

import copy
import zlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

HIDDEN, HEADS, VOCABULARY, SEQUENCE = 32, 4, 64, 16


def build_gpt(
    tp: int = 1,
    *,
    position_embedding: str = "rope",
    ddp: Any = None,
    linear_layers: tuple[int, ...] = (),
    **settings: Any,
) -> Any:
    """A DDP-wrapped GPT whose full weights depend only on their names; under SP if ``tp`` > 1.

    Args:
        ddp: DistributedDataParallelConfig; the default one if None.
        linear_layers: numbers from 0 of the layers that have a gated delta net.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.module import Float16Module
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.mimo.layers import language_layer_spec
    from megatron.mimo.layers.gated_delta_net import gated_delta_net_spec

    config = TransformerConfig(
        num_layers=2,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=tp,
        sequence_parallel=tp > 1,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        transformer_impl="local",
        **settings,
    )
    spec = language_layer_spec(config)
    for number in linear_layers:
        layer = copy.deepcopy(spec.submodules.layer_specs[number])
        layer.submodules.self_attention = gated_delta_net_spec(with_transformer_engine=False)
        spec.submodules.layer_specs[number] = layer
    model = GPTModel(
        config,
        spec,
        vocab_size=VOCABULARY,
        max_sequence_length=SEQUENCE,
        position_embedding_type=position_embedding,
    )
    for name, parameter in model.named_parameters():
        parameter.data.copy_(shard(parameter, full_weight(name, parameter, tp), tp))
    if config.bf16:
        model = Float16Module(config, model)
    return DistributedDataParallel(config, ddp or DistributedDataParallelConfig(), model)


def next_token_loss(model: Any, *, batch: int, seed: int, rows: slice = slice(None)) -> Tensor:
    """The mean loss on random tokens of the batch ``seed``, or on some of its rows."""
    generator = torch.Generator().manual_seed(seed)
    ids_BS, labels_BS = torch.randint(VOCABULARY, (2, batch, SEQUENCE), generator=generator)
    ids_BS, labels_BS = ids_BS[rows], labels_BS[rows]
    positions_BS = torch.arange(SEQUENCE).expand(len(ids_BS), -1)
    mask = torch.ones(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)
    return model(ids_BS, positions_BS, mask, labels=labels_BS).mean()


def full_weight(name: str, parameter: Tensor, tp: int) -> Tensor:
    shape = list(parameter.shape)
    if getattr(parameter, "tensor_model_parallel", False):
        shape[parameter.partition_dim] *= tp
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator) * 0.2


def shard(parameter: Tensor, full: Tensor, tp: int) -> Tensor:
    if not getattr(parameter, "tensor_model_parallel", False):
        return full
    return full.chunk(tp, dim=parameter.partition_dim)[dist.get_rank() % tp]
