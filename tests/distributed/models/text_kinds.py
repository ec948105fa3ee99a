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
