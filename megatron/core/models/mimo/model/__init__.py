"""The model: build, embed, merge, run the language model."""

from megatron.core.models.mimo.model.base import MimoModel

__all__ = ["MimoModel"]
