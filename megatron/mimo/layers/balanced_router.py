"""Routers whose experts are balanced by one loss over all layers.

The loss is ``core.models.mimo.model.language.expert_balance``'s; Megatron's own stay as they are.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from megatron.core.models.mimo.errors import ConfigError
from megatron.core.models.mimo.model.language.expert_balance import ExpertBalance
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

__all__ = ["BalancedRouter", "balanced_layers", "give_balance"]


class BalancedRouter(TopKRouter):
    """Megatron's, with its logits counted.

    Attributes:
        balance: who counts; None for nobody.
    """

    balance: ExpertBalance | None = None

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> Any:
        """Megatron's, of [S, B, E] and bool [S, B]."""
        if self.balance is not None:
            logits = self.balance.counted(logits, padding_mask, layer=self.layer_number)
        return super().routing(logits, padding_mask=padding_mask)


def balanced_layers(block: ModuleSpec, config: TransformerConfig) -> ModuleSpec:
    """A decoder's layers with routers that count; changed in place.

    Args:
        block: as ``language_layer_spec`` gives it.
        config: of the language model.

    Raises:
        ConfigError: another such loss, or a setting by which routers do not see the micro-batch.
    """
    others = config.moe_aux_loss_coeff
    if any(others) if isinstance(others, list) else others:
        raise ConfigError(
            f"--moe-aux-loss-coeff {others} beside transformers' loss that balances experts; give "
            "--router-aux-loss-coef 0 for Megatron's alone"
        )
    if config.moe_router_score_function != "softmax":
        raise ConfigError(
            f"--moe-router-score-function {config.moe_router_score_function} with transformers' "
            "loss that balances experts, which is one of softmax; give --router-aux-loss-coef 0"
        )
    if "quantile_balancing" in config.moe_router_load_balancing_type:
        raise ConfigError(
            "--moe-router-load-balancing-type quantile_balancing beside transformers' loss that "
            "balances experts; give --router-aux-loss-coef 0 for it alone"
        )
    if config.cuda_graph_impl != "none":
        raise ConfigError(
            f"--cuda-graph-impl {config.cuda_graph_impl} with transformers' loss that balances "
            "experts: a captured layer does not know its micro-batch; give --cuda-graph-impl none"
        )
    for layer in block.submodules.layer_specs:
        experts: Any = getattr(layer.submodules.mlp, "keywords", {}).get("submodules")
        if hasattr(experts, "router"):
            experts.router = BalancedRouter
    return block


def give_balance(language_model: nn.Module, balance: ExpertBalance) -> None:
    """Let all routers of a language model count."""
    for module in language_model.modules():
        if isinstance(module, BalancedRouter):
            module.balance = balance
