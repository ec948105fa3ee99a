"""Qwen3.5 with experts, one of which sees every token."""

from __future__ import annotations

from typing import Any

from megatron.mimo.models.common.frame_sample import TINY_TOKENS
from megatron.mimo.models.qwen3_5.model import TINY_PARTS, qwen3_5_family

__all__ = ["FAMILY"]


def tiny() -> Any:
    """A Qwen3.5 of about 0.3 million parameters, with four experts in each layer and a fifth."""
    from transformers import Qwen3_5MoeConfig

    text = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 40,
        "shared_expert_intermediate_size": 48,
    }
    text |= {k: v for k, v in TINY_PARTS["text_config"].items() if k != "intermediate_size"}
    return Qwen3_5MoeConfig(
        **TINY_PARTS | {"text_config": text},
        **TINY_TOKENS,
        architectures=["Qwen3_5MoeForConditionalGeneration"],
    )


FAMILY = qwen3_5_family("qwen3_5_moe", tiny)
