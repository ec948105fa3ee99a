"""Encoders: from the tensors of one modality to embedding rows."""

from megatron.mimo.encoders.vit import VisionTransformer, encoder_config

__all__ = ["VisionTransformer", "encoder_config"]
