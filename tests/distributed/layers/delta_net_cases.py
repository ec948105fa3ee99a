"""A small gated delta net with known weights, whole or on ranks, for several test files."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.rank_pool import model_parallel

HIDDEN, G, R, K, V, TAPS = 24, 4, 2, 8, 6, 4
SECTIONS = [K, K, R * V, R * V, R, R]  # query, key, values, gate, strength, decay of a key head


def build(*, tp: int = 1, cp: int = 1, **settings: Any) -> Any:
    from megatron.core.transformer.spec_utils import build_module
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.mimo.layers.gated_delta_net import gated_delta_net_spec

    groups = model_parallel(tp=tp, cp=cp)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        linear_num_key_heads=G,
        linear_num_value_heads=G * R,
        linear_key_head_dim=K,
        linear_value_head_dim=V,
        linear_conv_kernel_dim=TAPS,
        layernorm_epsilon=1e-6,
        tensor_model_parallel_size=tp,
        context_parallel_size=cp,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        transformer_impl="local",
        **settings,
    )
    spec = gated_delta_net_spec(with_transformer_engine=False)
    layer = build_module(spec, config=config, layer_number=1, pg_collection=groups)
    layer.load_state_dict(
        {name: own_part(layer, name, whole) for name, whole in whole_weights().items()}
    )
    return layer


def whole_weights() -> dict[str, Tensor]:
    """Of one process, in the layer's order; some heads forget much, some little."""
    generator = torch.Generator().manual_seed(3)
    shapes = {
        "in_proj.weight": (G * sum(SECTIONS), HIDDEN),
        "conv1d.weight": (G * sum(SECTIONS[:3]), 1, TAPS),
        "A_log": (G * R,),
        "dt_bias": (G * R,),
        "norm.weight": (V,),
        "out_proj.weight": (HIDDEN, G * R * V),
    }
    weights = {
        name: 0.5 * torch.randn(shape, generator=generator) for name, shape in shapes.items()
    }
    weights["A_log"] = torch.linspace(-6, 2, G * R)
    return weights


def own_part(layer: Any, name: str, whole: Tensor) -> Tensor:
    parameter = layer.get_parameter(name)
    if not getattr(parameter, "tensor_model_parallel", False):
        return whole
    group = layer.tp_group
    return whole.chunk(group.size(), dim=parameter.partition_dim)[group.rank()]


def hidden_and_gradient(tokens: int, rows: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    both = torch.randn(2, tokens, rows, HIDDEN, generator=generator)
    return both[0], both[1]


def packed(lengths: Sequence[int]) -> Any:
    from megatron.core.packed_seq_params import PackedSeqParams

    sums = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=sums,
        cu_seqlens_kv=sums,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
    )


def assert_near(got: dict[str, Tensor], expected: dict[str, Tensor], limit: float) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        error = ((got[name] - tensor).norm() / tensor.norm()).item()
        assert error < limit, f"{name}: relative error {error:.1e}"


def gathered(tensor: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return parts
