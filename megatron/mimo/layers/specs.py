"""Which modules a transformer is built of: the one place that decides.

Transformer Engine's where it is installed and ``config.transformer_impl`` (``--transformer-impl``)
is "transformer_engine", Megatron's default; else megatron-core's own, with this project's attention
and norms.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron.core.fusions.fused_layer_norm import FusedLayerNorm
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.mimo.errors import ConfigError
from megatron.core.models.vision.vit_layer_specs import (
    get_vit_layer_with_local_spec,
    get_vit_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.mimo.backend import capabilities
from megatron.mimo.layers.attention.core_attention import CoreAttention, serves
from megatron.mimo.layers.attention.self_attention import CachingSelfAttention
from megatron.mimo.layers.lean import LeanLayer
from megatron.mimo.layers.linear_layers import first_layer, with_linear_layers
from megatron.mimo.layers.norm import Norm
from megatron.mimo.layers.sandwich import SandwichLayer
from megatron.mimo.layers.traits import LayerTraits

__all__ = [
    "borders_on_host",
    "encoder_layer_spec",
    "language_layer_spec",
    "uses_transformer_engine",
]


def uses_transformer_engine(config: TransformerConfig) -> bool:
    """Whether the layers of ``config`` are Transformer Engine's.

    Raises:
        ConfigError: ``config.transformer_impl`` is one that is not for training.
    """
    if config.transformer_impl not in ("local", "transformer_engine"):
        raise ConfigError(
            f"transformer_impl is {config.transformer_impl!r}; expected 'local' or "
            "'transformer_engine'"
        )
    has_te = capabilities().has_transformer_engine()
    return has_te and config.transformer_impl == "transformer_engine"


def language_layer_spec(
    config: TransformerConfig,
    *,
    vp_stage: int | None = None,
    pp_rank: int | None = None,
    traits: LayerTraits | None = None,
) -> ModuleSpec:
    """Layers with causal attention, and the norm after the last: GPTModel's transformer_layer_spec.

    Dense and mixture-of-experts layers, latent attention and norms of queries and keys follow
    ``config``; so do the layers that have a gated delta net in place of attention,
    ``linear_attention_freq``.

    Args:
        config: of the language model.
        vp_stage: virtual pipeline chunk, with interleaving.
        pp_rank: pipeline stage; this rank's in ``parallel_state`` by default.
        traits: what the layers have besides.

    Raises:
        ConfigError: see :func:`uses_transformer_engine`.
    """
    with_te = uses_transformer_engine(config)
    block = get_gpt_decoder_block_spec(
        config,
        use_transformer_engine=with_te,
        normalization=config.normalization,
        qk_l2_norm=config.qk_l2_norm,
        vp_stage=vp_stage,
        pp_rank=pp_rank,
    )
    traits = traits or LayerTraits()
    for layer in block.layer_specs:
        if not with_te:
            _name_norms_as_fused(layer)
        attention = layer.submodules.self_attention
        if attention.module is SelfAttention:
            attention.module = CachingSelfAttention
            attention.params = {**attention.params, "traits": traits}
        if traits.sandwich_norms:
            layer.module = SandwichLayer
        elif layer.module is TransformerLayer:
            layer.module = LeanLayer
    if with_te and traits.sees_spans:
        from megatron.core.extensions.transformer_engine import TEDotProductAttention

        _replace(block, {TEDotProductAttention: CoreAttention})
    if config.linear_attention_freq is not None:
        first = first_layer(config, vp_stage=vp_stage, pp_rank=pp_rank)
        block.layer_specs = with_linear_layers(block.layer_specs, config, first, with_te=with_te)
    return _block_spec(block, config, with_te=with_te)


def encoder_layer_spec(config: TransformerConfig) -> ModuleSpec:
    """Layers with bidirectional attention (no mask) of an encoder, or of one of its equal stages.

    Args:
        config: of the encoder.

    Returns:
        The spec of its ``TransformerBlock``, with a norm after the last layer.

    Raises:
        ConfigError: see :func:`uses_transformer_engine`.
    """
    with_te = uses_transformer_engine(config)
    if with_te:
        from megatron.core.extensions.transformer_engine import TENorm

        layer, final_norm = get_vit_layer_with_transformer_engine_spec(), TENorm
        # Dense and ragged attention without a mask takes PyTorch's fused kernels: Transformer
        # Engine's asks some 0.8 ms of Python for what a layer of an encoder computes in 0.1.
        if serves(config):
            layer.submodules.self_attention.submodules.core_attention = CoreAttention
    else:
        layer, final_norm = get_vit_layer_with_local_spec(), WrappedTorchNorm
        _name_norms_as_fused(layer)
    layer.module = LeanLayer
    block = TransformerBlockSubmodules(
        layer_specs=[layer] * (config.num_layers // config.pipeline_model_parallel_size),
        layer_norm=final_norm,
    )
    return _block_spec(block, config, with_te=with_te)


def _name_norms_as_fused(layer: ModuleSpec) -> None:
    """Let a checkpoint call norms what they are called where Transformer Engine's layers hold them.

    Theirs hold the norm before queries, keys and values, and the norm before a dense feed-forward:
    neither that before experts nor, with latent attention, that before attention.
    """
    parts = layer.submodules
    names = {}
    if _made(parts.self_attention) is not MLASelfAttention:
        names["input_layernorm."] = "self_attention.linear_qkv.layer_norm_"
    if _made(parts.mlp) is not MoELayer:
        names["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    parts.sharded_state_dict_keys_map = names


def _made(part: Any) -> Any:
    """The class of what a spec builds; megatron-core has two ways of saying it."""
    return part.func if isinstance(part, partial) else getattr(part, "module", part)


def borders_on_host(config: TransformerConfig, like: Tensor) -> bool:
    """Whether an encoder's attention plans its tiles on the host, from borders that lie there.

    A fused kernel, and Transformer Engine's attention, read borders on the device.

    Args:
        config: of the encoder.
        like: of the device and dtype of its activations.
    """
    if uses_transformer_engine(config) and not serves(config):
        return False
    return not (like.is_cuda and like.dtype in (torch.float16, torch.bfloat16))


def _block_spec(
    block: TransformerBlockSubmodules, config: TransformerConfig, *, with_te: bool
) -> ModuleSpec:
    if not with_te:
        _replace(block, _replacements(config))
    return ModuleSpec(module=TransformerBlock, submodules=block)


def _replacements(config: TransformerConfig) -> dict[type, type]:
    """What takes the place of megatron-core's.

    apex's LayerNorm stays where its kernel is there; it is no RMSNorm.
    """
    replacements: dict[type, type] = {WrappedTorchNorm: Norm}
    has_kernel = capabilities().has_apex("fused_layer_norm_cuda")
    if config.normalization != "LayerNorm" or not has_kernel:
        replacements[FusedLayerNorm] = Norm
    if config.softmax_type == "vanilla":  # megatron-core's knows the others, on one CP rank
        replacements[DotProductAttention] = CoreAttention
    return replacements


def _replace(part: Any, replacements: dict[type, type]) -> None:
    """Replaces classes in a tree of specs and submodules."""
    if isinstance(part, list):
        for member in part:
            _replace(member, replacements)
    elif isinstance(part, ModuleSpec):
        _replace(part.submodules, replacements)
    elif dataclasses.is_dataclass(part):
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            if isinstance(value, type) and value in replacements:
                setattr(part, field.name, replacements[value])
            else:
                _replace(value, replacements)
