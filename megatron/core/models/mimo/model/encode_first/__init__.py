"""The schedule that runs encoders on grids of their own around the language model's schedule."""

from megatron.core.models.mimo.model.encode_first.schedule import EncodeFirst

__all__ = ["EncodeFirst"]
