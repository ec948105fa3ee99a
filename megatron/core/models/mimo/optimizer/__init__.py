"""One optimizer per module of a MimoModel, stepped as one."""

from megatron.core.models.mimo.optimizer.combined import MimoOptimizer, ModuleOptimizerInfo
from megatron.core.models.mimo.optimizer.per_module import get_mimo_optimizer

__all__ = ["MimoOptimizer", "ModuleOptimizerInfo", "get_mimo_optimizer"]
