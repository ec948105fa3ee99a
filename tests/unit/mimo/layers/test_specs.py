"""What layers are built of, and what a checkpoint calls their norms."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.mimo.layers import encoder_layer_spec, language_layer_spec

NORMS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


def config(**changes: Any) -> TransformerConfig:
    sizes = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 2}
    return TransformerConfig(**sizes | {"transformer_impl": "local"} | changes)


def names(config: TransformerConfig) -> list[dict[str, str]]:
    """What a checkpoint calls norms, by layer."""
    spec = language_layer_spec(config, pp_rank=0)
    return [layer.submodules.sharded_state_dict_keys_map for layer in spec.submodules.layer_specs]


def test_a_checkpoint_calls_norms_what_transformer_engine_calls_them() -> None:
    """Its layers hold the norm before a dense feed-forward, but not that before experts."""
    assert names(config()) == [NORMS, NORMS]
    (encoder, _) = encoder_layer_spec(config()).submodules.layer_specs
    assert encoder.submodules.sharded_state_dict_keys_map == NORMS

    experts = config(num_moe_experts=2, moe_layer_freq=[1, 0], moe_ffn_hidden_size=16)
    before_attention = {"input_layernorm.": NORMS["input_layernorm."]}
    assert names(experts) == [before_attention, NORMS]
