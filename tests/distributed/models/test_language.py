"""Language models against transformers' with the same weights: logits and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed.models.unchecked import unchecked_family
from tests.rank_pool import RankPool

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 509,
    "max_position_embeddings": 16384,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,  # not what megatron-core takes by default
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 8.0,
    "original_max_position_embeddings": 128,
}
GEMMA3 = {
    "head_dim": 24,
    "query_pre_attn_scalar": 17,
    "sliding_window": 40,
    "layer_types": None,
    "num_hidden_layers": 3,
    "sliding_window_pattern": 3,
}
EXPERTS = {
    "head_dim": 24,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama3, tied": {
        "model_type": "llama",
        "rope_parameters": LLAMA3_ROPE,
        "tie_word_embeddings": True,
    },
    "llama, wide heads": {"model_type": "llama", "head_dim": 32, "num_key_value_heads": 4},
    "llama, biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama, attention has biases": {"model_type": "llama", "attention_bias": True},
    "llama, feed-forward has biases": {"model_type": "llama", "mlp_bias": True},
    "llama3, other factors": {
        "model_type": "llama",
        "rope_parameters": LLAMA3_ROPE
        | {
            "low_freq_factor": 2.0,
            "high_freq_factor": 3.5,
            "original_max_position_embeddings": 256,
            "factor": 4.0,
        },
    },
    "llama, linear": {"model_type": "llama", "rope_parameters": LINEAR},
    "llama, dynamic": {"model_type": "llama", "rope_parameters": LINEAR | {"rope_type": "dynamic"}},
    "llama, yarn": {"model_type": "llama", "rope_parameters": YARN},
    "llama, yarn with all parameters": {
        "model_type": "llama",
        "rope_parameters": YARN
        | {
            "beta_fast": 16,
            "beta_slow": 2,
            "mscale": 0.7,
            "mscale_all_dim": 0.9,
            "truncate": False,
        },
    },
    "qwen2, yarn with its own factor": {
        "model_type": "qwen2",
        "rope_parameters": YARN | {"attention_factor": 0.8},
    },
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "mistral, windows": {"model_type": "mistral", "sliding_window": 40},
    "qwen2, windows": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 33,
        "max_window_layers": 1,
    },
    "qwen3, windows and biases": {
        "model_type": "qwen3",
        "head_dim": 16,
        "use_sliding_window": True,
        "sliding_window": 33,
        "layer_types": ["sliding_attention", "full_attention"],
        "attention_bias": True,
    },
    "gemma3": {"model_type": "gemma3_text", **GEMMA3},
    "gemma3, untied, capped": {
        "model_type": "gemma3_text",
        **GEMMA3,
        "tie_word_embeddings": False,
        "final_logit_softcapping": 3.0,
        "attention_bias": True,
        "num_hidden_layers": 7,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 5e5, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 3e3},
        },
    },
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 24},
    "qwen3, tied": {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
    "qwen3_moe": {"model_type": "qwen3_moe", **EXPERTS},
    "qwen3_moe, windows and biases": {
        "model_type": "qwen3_moe",
        **EXPERTS,
        "use_sliding_window": True,
        "sliding_window": 40,
        "attention_bias": True,
    },
    "qwen3_moe, weights that sum to one": {
        "model_type": "qwen3_moe",
        **EXPERTS,
        "norm_topk_prob": True,
    },
    "qwen3_moe, some layers dense": {
        "model_type": "qwen3_moe",
        **EXPERTS,
        "num_hidden_layers": 4,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [1],
        "tie_word_embeddings": True,
    },
    "qwen2, tied": {"model_type": "qwen2", "tie_word_embeddings": True},
}


def text_family() -> Any:
    from megatron.core.models.mimo import MimoModelConfig
    from megatron.mimo.models.common.family import Media
    from megatron.mimo.models.common.keys import KeyTable
    from megatron.mimo.models.common.language import (
        language_arguments,
        language_entries,
        language_spec,
    )

    def no_media(*_: Any) -> Any:
        raise AssertionError("a language model has no media")

    return unchecked_family(
        name="text",
        language=language_arguments,
        build=lambda config, settings, places: MimoModelConfig(
            language_model_spec=language_spec(settings, places.language, config),
            modality_submodules_spec={},
            special_token_ids={},
        ),
        keys=lambda config: KeyTable(entries=language_entries(config, model="model.", head="")),
        media=lambda config: Media(special_token_ids={}, formats={}),
        sample=no_media,
        tiny=no_media,
        example=no_media,
    )


def compare(changes: dict[str, Any]) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from megatron.mimo.arguments.standalone import build_model, model_settings, process_groups
    from megatron.mimo.checkpoints.weights import load_hugging_face

    config = AutoConfig.for_model(**SMALL | changes)
    torch.manual_seed(1)
    reference = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, std=0.1)  # biases and norms begin at 0 and 1
    family = text_family()
    ids_BS = torch.randint(1, config.vocab_size, (2, 300))  # far enough for any RoPE
    with process_groups() as device:
        settings = model_settings(family, config)
        model = build_model(family, config, settings, device=device)
        weights = reference.state_dict()
        if config.tie_word_embeddings:
            del weights["lm_head.weight"]
        table = family.keys(config)
        load_hugging_face(model, weights, table)
        logits, _ = model(input_ids=ids_BS, position_ids=torch.arange(300).expand(2, -1))
        logits = logits[..., : config.vocab_size]
        expected = reference(ids_BS).logits
        assert (logits - expected).abs().max() < 1e-4
        logits.square().sum().backward()
        expected.square().sum().backward()
        theirs, ours = dict(reference.named_parameters()), dict(model.named_parameters())
        theirs, table = table.laid_out({name: one.grad for name, one in theirs.items()})
        rows = list(table.each())
        assert {row.mimo for row in rows} == ours.keys()
        for row in rows:
            gradient = ours[row.mimo].grad
            assert gradient is not None
            for name, part in zip(row.hf, row.transform.to_hf(gradient), strict=True):
                wanted = theirs[name]
                assert wanted is not None
                assert (part - wanted).norm() < 1e-3 * wanted.norm(), name


@pytest.mark.parametrize("name", VARIANTS)
def test_language_model_equals_that_of_transformers(ranks: RankPool, name: str) -> None:
    ranks(1)(compare, VARIANTS[name])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "gemma"}, "model_type is 'gemma'; expected one of llama"),
        ({"model_type": "llama", "hidden_act": "gelu"}, "hidden_act is 'gelu'; expected 'silu'"),
        (
            {"model_type": "llama", "rope_parameters": LINEAR | {"partial_rotary_factor": 0.5}},
            "partial_rotary_factor is 0.5; expected 1.0",
        ),
        (
            {"model_type": "gemma3_text", "use_bidirectional_attention": True},
            "use_bidirectional_attention is True",
        ),
        (
            {"model_type": "gemma3_text", "attn_logit_softcapping": 50.0},
            "attn_logit_softcapping is 50.0",
        ),
        (
            {"model_type": "gemma3_text", "hidden_activation": "silu"},
            "hidden_activation is 'silu'; expected 'gelu_pytorch_tanh'",
        ),
        (
            {
                "model_type": "qwen3_moe",
                **EXPERTS,
                "num_experts_per_tok": 1,
                "norm_topk_prob": True,
            },
            "norm_topk_prob is True; expected False",
        ),
    ],
)
def test_what_it_does_not_have_is_refused(settings: dict[str, Any], message: str) -> None:
    from transformers import AutoConfig

    from megatron.core.models.mimo.errors import UnsupportedError
    from megatron.mimo.models.common.language import language_arguments

    with pytest.raises(UnsupportedError, match=message):
        language_arguments(AutoConfig.for_model(**SMALL | settings))
