"""Refuses flags that make another model than the Hugging Face configuration describes.

A checkpoint of a model family keeps this configuration, and export, generation and ``verify`` read
it: with other flags it would describe a model that does not exist.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping

from megatron.core.models.mimo.errors import ConfigError

__all__ = ["refuse_other_model"]

# What a family says of its language model, by argparse destination.
_SAID = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups"),
    *("kv_channels", "group_query_attention", "vocab_size", "position_embedding_type"),
    *("rotary_base", "rotary_percent", "mrope_section", "normalization", "layernorm_epsilon"),
    *("swiglu", "add_bias_linear", "add_qkv_bias", "untie_embeddings_and_output_weights"),
    *("moe_ffn_hidden_size", "moe_layer_freq", "moe_router_topk", "moe_router_pre_softmax"),
    *("linear_conv_kernel_dim", "linear_key_head_dim", "linear_value_head_dim"),
    *("linear_num_key_heads", "linear_num_value_heads"),
)
# What a family has only if it says so, and the values that mean that it is absent.
_ABSENT: Mapping[str, object] = {
    "use_rope_scaling": False,
    "rope_scaling_factor": 8.0,
    "rotary_interleaved": False,
    "rotary_seq_len_interpolation_factor": None,
    "no_rope_freq": None,
    "layernorm_zero_centered_gamma": False,
    "apply_residual_connection_post_layernorm": False,
    "qk_layernorm": False,
    "qk_l2_norm": False,
    "qk_clip": False,
    "window_size": None,
    "window_attn_skip_freq": None,
    "softmax_type": "vanilla",
    "attention_output_gate": False,
    "multi_latent_attention": False,
    "experimental_attention_variant": None,
    "linear_attention_freq": None,
    "squared_relu": False,
    "quick_geglu": False,
    "activation_func_clamp_value": None,
    "glu_linear_offset": 0.0,
    "num_experts": None,
    "moe_shared_expert_intermediate_size": None,
    "moe_shared_expert_gate": False,
    "mtp_num_layers": None,
    "use_mup": False,
    "heterogeneous_layers_config_path": None,
    "hybrid_layer_pattern": None,
}


def refuse_other_model(args: Namespace, told: Mapping[str, object]) -> None:
    """Refuse arguments with which the model is not the one that its configuration describes.

    Args:
        args: parsed arguments of the run.
        told: what the family says of the configuration, see ``Family.arguments``.

    Raises:
        ConfigError: names the argument, both values and the remedy.
    """
    expected = {**_ABSENT, **{name: told[name] for name in (*_SAID, *_ABSENT) if name in told}}
    for name, value in expected.items():
        if getattr(args, name, value) != value:
            raise ConfigError(
                f"{name} is {getattr(args, name)} and the model's configuration says {value}; the "
                "checkpoint could never be exported. Change it in a config.json and give its "
                "folder with --hf, or keep nothing: --no-output"
            )
