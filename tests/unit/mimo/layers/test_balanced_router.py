"""What cannot stand beside the loss that balances experts over all layers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from megatron.core.models.mimo.errors import ConfigError
from megatron.core.models.mimo.model.language.expert_balance import BalancedPart
from megatron.mimo.layers.balanced_router import balanced_layers

FITTING = {
    "moe_aux_loss_coeff": 0.0,
    "moe_router_score_function": "softmax",
    "moe_router_load_balancing_type": "aux_loss",
    "cuda_graph_impl": "none",
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moe_aux_loss_coeff": 0.1}, "--moe-aux-loss-coeff 0.1 beside .*--router-aux-loss-coef 0"),
        ({"moe_aux_loss_coeff": [0.0, 0.1]}, r"--moe-aux-loss-coeff \[0.0, 0.1\] beside"),
        ({"moe_router_score_function": "sigmoid"}, "--moe-router-score-function sigmoid with"),
        ({"moe_router_load_balancing_type": ["quantile_balancing"]}, "quantile_balancing beside"),
        ({"cuda_graph_impl": "local"}, "--cuda-graph-impl local with"),
    ],
)
def test_what_does_not_go_with_it_is_refused(changes: dict[str, Any], message: str) -> None:
    block: Any = SimpleNamespace(submodules=SimpleNamespace(layer_specs=[]))
    assert balanced_layers(block, SimpleNamespace(**FITTING)) is block  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=message):
        balanced_layers(block, SimpleNamespace(**FITTING | changes))  # type: ignore[arg-type]


def test_a_model_without_experts_has_no_such_loss() -> None:
    with pytest.raises(ConfigError, match=r"a loss of weight 0\.1 for 0 experts in 0 layers"):
        BalancedPart(weight=0.1, layers=0, experts=0, best=2)
