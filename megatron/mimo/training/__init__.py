"""The training layer: recipes on Megatron's own ``pretrain``."""

from megatron.mimo.training.run import main

__all__ = ["main"]
