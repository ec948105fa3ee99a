"""Qwen3-VL with experts: the same model, whose language model is a Qwen3-MoE."""

from __future__ import annotations

from typing import Any

from megatron.mimo.models.common.frame_sample import TINY_TOKENS
from megatron.mimo.models.qwen3_vl.model import TINY_PARTS, qwen3_vl_family

__all__ = ["FAMILY"]


def tiny() -> Any:
    """A Qwen3-VL of about 0.3 million parameters, with four experts in each layer."""
    from transformers import Qwen3VLMoeConfig

    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
    return Qwen3VLMoeConfig(
        **TINY_PARTS | {"text_config": TINY_PARTS["text_config"] | experts},
        **TINY_TOKENS,
        architectures=["Qwen3VLMoeForConditionalGeneration"],
    )


FAMILY = qwen3_vl_family("qwen3_vl_moe", tiny)
