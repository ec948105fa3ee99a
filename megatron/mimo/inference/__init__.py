"""Generation: batches of prompts with media, a cache of keys and values, any layout."""

from megatron.mimo.inference.generator import Generator
from megatron.mimo.inference.sampling import SamplingOptions

__all__ = ["Generator", "SamplingOptions"]
