"""The layer in a spec: on Transformer Engine's linear layers, or megatron-core's own."""

from __future__ import annotations

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.mimo.layers.gated_delta_net.layer import GatedDeltaNet, GatedDeltaNetSubmodules

__all__ = ["gated_delta_net_spec"]


def gated_delta_net_spec(*, with_transformer_engine: bool) -> ModuleSpec:
    """What takes the place of ``self_attention`` in a layer's submodules.

    The norm before it is the layer's ``input_layernorm``: it is not part of ``in_proj``.

    Args:
        with_transformer_engine: as ``uses_transformer_engine`` says of the config.
    """
    in_proj, out_proj = ColumnParallelLinear, RowParallelLinear
    if with_transformer_engine:
        from megatron.core.extensions.transformer_engine import (
            TEColumnParallelLinear,
            TERowParallelLinear,
        )

        in_proj, out_proj = TEColumnParallelLinear, TERowParallelLinear
    submodules = GatedDeltaNetSubmodules(in_proj=in_proj, out_proj=out_proj)
    return ModuleSpec(module=GatedDeltaNet, submodules=submodules)
