"""Sizes of published parts that several models are made of, as Hugging Face configurations."""

from __future__ import annotations

from typing import Any

__all__ = ["WHISPER_LARGE", "clip_large", "vicuna"]

# The encoder of Whisper large, version 3, for ``WhisperConfig`` and ``Qwen2AudioEncoderConfig``.
WHISPER_LARGE: dict[str, Any] = {
    "num_mel_bins": 128,
    "encoder_layers": 32,
    "encoder_attention_heads": 20,
    "encoder_ffn_dim": 5120,
    "d_model": 1280,
    "max_source_positions": 1500,
}


def clip_large() -> Any:
    """CLIP ViT-L/14 at 336 pixels."""
    from transformers import CLIPVisionConfig

    return CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )


def vicuna(
    *,
    pad_token_id: int,
    hidden_size: int = 4096,
    intermediate_size: int = 11008,
    num_hidden_layers: int = 32,
    num_attention_heads: int = 32,
) -> Any:
    """Vicuna 1.5 (7B by default), its vocabulary extended for placeholders as LLaVA's is."""
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        vocab_size=32064,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        pad_token_id=pad_token_id,
    )
