"""LLaVA's tiny model with other language models: a kind of these is proved in a whole model."""

from __future__ import annotations

from functools import partial
from typing import Any

from megatron.mimo.models.common.tiny import TINY_TEXT

EXPERTS: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "head_dim": 24,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "norm_topk_prob": True,
}
KINDS: dict[str, dict[str, Any]] = {
    "qwen3": {"model_type": "qwen3", "head_dim": 24},
    "mistral, windows": {"model_type": "mistral", "sliding_window": 6},
    "qwen2, windows": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
    },
    "llama, biases": {
        "model_type": "llama",
        "attention_bias": True,
        "mlp_bias": True,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 8.0,
            "original_max_position_embeddings": 16,
        },
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "head_dim": 24,
        "query_pre_attn_scalar": 17,
        "sliding_window": 5,
        "num_hidden_layers": 4,
        "sliding_window_pattern": 3,
        "tie_word_embeddings": True,
    },
    "qwen3_moe": EXPERTS,
    "qwen3_moe, mixed": {
        **EXPERTS,
        "norm_topk_prob": False,
        "num_hidden_layers": 4,
        "mlp_only_layers": [2],
        "tie_word_embeddings": True,
    },
}


def use_text(name: str, config: Any) -> None:
    """Put the language model of ``KINDS[name]`` into a configuration of LLaVA."""
    from transformers import AutoConfig

    config.text_config = AutoConfig.for_model(**TINY_TEXT | KINDS[name])
    config.tie_word_embeddings = config.text_config.tie_word_embeddings


def with_text(name: str) -> partial[None]:
    """The same, for ``compute_expected``."""
    return partial(use_text, name)


def has_experts(name: str) -> bool:
    """Whether a kind's layers, or some of them, are mixtures of experts."""
    return "num_experts" in KINDS[name]


def take_all_experts(config: Any) -> None:
    """Every token goes to every expert, in place; nothing where there are none.

    For what compares several steps: of fewer, some token's second and third become almost equal as
    training goes on, and rounding chooses.
    """
    text = config.get_text_config()
    if hasattr(text, "num_experts"):
        text.num_experts_per_tok = text.num_experts
