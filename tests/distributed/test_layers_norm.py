"""A GPT with the project's norms: sequence parallelism over two ranks equals one process."""

from __future__ import annotations

import zlib
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.rank_pool import RankPool, model_parallel

HIDDEN, HEADS, VOCABULARY, SEQUENCE, BATCH = 32, 4, 64, 16, 3


def build_gpt(tp: int, **settings: Any) -> Any:
    """A DDP-wrapped GPT whose full weights depend only on their names."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.mimo.layers import language_layer_spec

    position_embedding = settings.pop("position_embedding")
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
    model = GPTModel(
        config,
        language_layer_spec(config),
        vocab_size=VOCABULARY,
        max_sequence_length=SEQUENCE,
        position_embedding_type=position_embedding,
    )
    for name, parameter in model.named_parameters():
        parameter.data.copy_(shard(parameter, full_weight(name, parameter, tp), tp))
    return DistributedDataParallel(config, DistributedDataParallelConfig(), model)


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


def loss_and_gradients(tp: int, settings: dict[str, Any]) -> tuple[float, dict[str, Tensor]]:
    """One step's loss and, unsharded, the gradient of every parameter."""
    from megatron.core.distributed import finalize_model_grads

    model_parallel(tp=tp)
    model = build_gpt(tp, **settings)
    generator = torch.Generator().manual_seed(0)
    ids_BS, labels_BS = torch.randint(VOCABULARY, (2, BATCH, SEQUENCE), generator=generator)
    positions_BS = torch.arange(SEQUENCE).expand(BATCH, -1)
    mask = torch.ones(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)
    loss = model(ids_BS, positions_BS, mask, labels=labels_BS).mean()
    loss.backward()
    finalize_model_grads([model])
    gradients = {}
    for name, parameter in model.module.named_parameters():
        gradient = parameter.main_grad.clone()
        if getattr(parameter, "tensor_model_parallel", False):
            parts = [torch.empty_like(gradient) for _ in range(tp)]
            dist.all_gather(parts, gradient)
            gradient = torch.cat(parts, dim=parameter.partition_dim)
        gradients[name] = gradient
    return loss.item(), gradients


@pytest.mark.parametrize(
    "settings",
    [
        {"position_embedding": "learned_absolute", "layernorm_zero_centered_gamma": True},
        {"position_embedding": "rope", "normalization": "RMSNorm", "qk_layernorm": True},
    ],
    ids=["LayerNorm", "RMSNorm"],
)
def test_sequence_parallel_equals_one_process(ranks: RankPool, settings: dict[str, Any]) -> None:
    ((expected_loss, expected),) = ranks(1)(loss_and_gradients, 1, settings)
    norms = [name for name in expected if "layernorm" in name]
    assert len(norms) >= 5
    for loss, gradients in ranks(2)(loss_and_gradients, 2, settings):
        assert loss == pytest.approx(expected_loss, rel=1e-6)
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            error = (gradient - expected[name]).norm() / expected[name].norm()
            assert error < 1e-5, f"{name}: relative error {error:.1e}"
