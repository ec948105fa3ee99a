"""What transformers are built of, with Transformer Engine and apex and without."""

from megatron.mimo.layers.adam import Adam, install_adam
from megatron.mimo.layers.attention.core_attention import CoreAttention
from megatron.mimo.layers.norm import Norm
from megatron.mimo.layers.specs import (
    borders_on_host,
    encoder_layer_spec,
    language_layer_spec,
    uses_transformer_engine,
)
from megatron.mimo.layers.traits import LayerTraits

__all__ = [
    "Adam",
    "CoreAttention",
    "LayerTraits",
    "Norm",
    "borders_on_host",
    "encoder_layer_spec",
    "install_adam",
    "language_layer_spec",
    "uses_transformer_engine",
]
