"""Configuration of pretrained encoders, most of which are plain: CLIP, SigLIP, Whisper."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from torch import Tensor
from torch.nn import functional as F

from megatron.core.activations import quick_gelu
from megatron.core.models.mimo.errors import UnsupportedError
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.mimo.encoders.vit import encoder_config

__all__ = ["activation_function", "plain_encoder_config", "pretrained_encoder_config"]

Activation = Callable[[Tensor], Tensor]

_gelu_tanh = partial(F.gelu, approximate="tanh")
# By the names that Hugging Face's configurations use.
_ACTIVATIONS: dict[str, Activation] = {
    "gelu": F.gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "quick_gelu": quick_gelu,
    "relu": F.relu,
    "silu": F.silu,
}


def activation_function(name: str) -> Activation:
    """The function behind the name that a Hugging Face configuration gives it.

    Raises:
        UnsupportedError: unknown.
    """
    if name not in _ACTIVATIONS:
        raise UnsupportedError(
            f"activation {name!r} is not supported; expected one of {', '.join(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[name]


def pretrained_encoder_config(
    language: TransformerConfig,
    *,
    num_layers: int,
    hidden_size: int,
    num_attention_heads: int,
    ffn_hidden_size: int,
    **architecture: Any,
) -> TransformerConfig:
    """An encoder with biases everywhere, and without dropout and Megatron's variants of layers.

    Only precision, recomputation, initialisation and tensor parallelism are the language model's,
    as :func:`encoder_config` says; nothing of its architecture is.

    Args:
        language: configuration of the language model.
        num_layers: layers that are built.
        hidden_size: width of the residual stream.
        num_attention_heads: heads of each layer.
        ffn_hidden_size: width inside the MLP.
        architecture: fields that this encoder has otherwise, its norm and its MLP among them.

    Raises:
        ConfigError: the sizes do not fit each other or the tensor-parallel size.
    """
    encoder = encoder_config(
        language,
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_attention_heads=num_attention_heads,
        ffn_hidden_size=ffn_hidden_size,
    )
    plain: dict[str, Any] = {
        "layernorm_zero_centered_gamma": False,
        "add_bias_linear": True,
        "add_qkv_bias": True,
        "activation_func_clamp_value": None,
        "glu_linear_offset": 0.0,
        "use_te_activation_func": False,
        "qk_layernorm": False,
        "qk_l2_norm": False,
        "attention_output_gate": False,
        "window_size": None,
        "softmax_type": "vanilla",
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    return replace(encoder, **plain | architecture)


def plain_encoder_config(
    language: TransformerConfig,
    *,
    num_layers: int,
    hidden_size: int,
    num_attention_heads: int,
    ffn_hidden_size: int,
    activation: str,
    layernorm_epsilon: float,
    attention_dropout: float = 0.0,
    normalization: Literal["LayerNorm", "RMSNorm"] = "LayerNorm",
) -> TransformerConfig:
    """An encoder with biases everywhere and an MLP without a gate.

    Args:
        language: as for :func:`pretrained_encoder_config`, and so the sizes.
        num_layers: layers that are built.
        hidden_size: width of the residual stream.
        num_attention_heads: heads of each layer.
        ffn_hidden_size: width inside the MLP.
        activation: of the MLP, by its name in Hugging Face's configurations.
        layernorm_epsilon: of every norm.
        attention_dropout: of attention weights.
        normalization: kind of every norm.

    Raises:
        ConfigError: the sizes do not fit each other or the tensor-parallel size.
        UnsupportedError: unknown activation.
    """
    return pretrained_encoder_config(
        language,
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_attention_heads=num_attention_heads,
        ffn_hidden_size=ffn_hidden_size,
        normalization=normalization,
        layernorm_epsilon=layernorm_epsilon,
        gated_linear_unit=False,
        activation_func=activation_function(activation),
        # Megatron's fused kernel for "gelu" is its tanh approximation.
        bias_activation_fusion=False,
        attention_dropout=attention_dropout,
    )
