"""One optimizer per module of a MimoModel, stepped as one."""

from megatron.core.models.mimo.optimizer.build import get_mimo_optimizer
from megatron.core.models.mimo.optimizer.combined import MimoOptimizer, ModuleOptimizerInfo

__all__ = ["MimoOptimizer", "ModuleOptimizerInfo", "get_mimo_optimizer"]
