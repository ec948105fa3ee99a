"""The gated delta net: linear attention with a state, chunked, on any device.

``layer`` wires: projections, ``token_functions`` (convolution, gates, gated norm) and the rule:
``delta_rule`` in chunks, ``decoding`` token by token, ``fla`` on flash-linear-attention's kernels.
``heads_over_ranks`` and ``states_over_ranks`` are its context parallelism, ``documents`` its packed
rows, ``weight_order`` and ``sizes`` the order and sizes of its weights.
"""

from megatron.mimo.layers.gated_delta_net.delta_rule import gated_delta_rule
from megatron.mimo.layers.gated_delta_net.layer import GatedDeltaNet, GatedDeltaNetSubmodules
from megatron.mimo.layers.gated_delta_net.spec import gated_delta_net_spec
from megatron.mimo.layers.gated_delta_net.weight_order import group_rows, ungroup_rows

__all__ = [
    "GatedDeltaNet",
    "GatedDeltaNetSubmodules",
    "gated_delta_net_spec",
    "gated_delta_rule",
    "group_rows",
    "ungroup_rows",
]
