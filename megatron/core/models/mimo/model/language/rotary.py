"""Multimodal RoPE under sharding: the model cuts positions, the rotary embedding does not.

megatron-core's ``MultimodalRotaryEmbedding`` deals the whole sequence out to context-parallel
ranks. Packed sequences are dealt out document by document, so the model cuts positions as it cuts
everything else (``SequenceCut``): position ids of a dense batch before the embedding. Those of a
packed sequence stay whole; megatron-core's rotation takes each document's share itself.

Legend: S sequence, B micro-batch, T packed tokens.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron.core.models.common.embeddings.rotary_pos_embedding import MultimodalRotaryEmbedding
from megatron.core.models.mimo.alignment.cut import SequenceCut
from megatron.core.models.mimo.config import MimoModelConfig
from megatron.core.models.mimo.config.base_configs import language_config
from megatron.core.models.mimo.errors import ConfigError, InputError, UnsupportedError
from megatron.core.utils import unwrap_model

_AXES = 3  # time, height, width


def refuse_mrope(mimo_config: MimoModelConfig) -> None:
    """Raise ``ConfigError`` where a multimodal rotary embedding cannot do what it is asked for."""
    config = language_config(mimo_config)
    params = mimo_config.language_model_spec.params
    kind = getattr(config, "position_embedding_type", params.get("position_embedding_type"))
    if kind != "mrope" or config.multi_latent_attention:
        return
    sections, percent = config.mrope_section, params.get("rotary_percent", 1.0)
    size = config.kv_channels if percent >= 1.0 else int(config.kv_channels * percent)
    if sections is None or len(sections) != _AXES or 2 * sum(sections) != size:
        got = "is None" if sections is None else f"{list(sections)} sums up to {sum(sections)}"
        raise ConfigError(
            f"mrope_section {got}; expected three numbers (time, height, width) that sum up to "
            f"{size // 2}, half of the rotated head size {size} = kv_channels "
            f"{config.kv_channels} * rotary_percent {percent}"
        )
    if config.rotary_interleaved:
        raise ConfigError(
            "rotary_interleaved is set with position_embedding_type 'mrope', whose sections are "
            "of head halves; set rotary_interleaved=False"
        )
    if config.apply_rope_fusion and mimo_config.kv_format == "thd":
        raise ConfigError(_fusion_message("kv_format = 'thd'"))


def leave_cutting_to_the_model(language_model: Any) -> bool:
    """Let a multimodal rotary embedding rotate by the positions that it is given, uncut.

    Megatron's would cut them over its context-parallel group, whatever documents a row has.

    Returns:
        True where the language model rotates by positions in three axes.
    """
    rotary = getattr(language_model, "rotary_pos_emb", None)
    if not isinstance(rotary, MultimodalRotaryEmbedding):
        return False
    rotary.cp_group = None
    return True


def positions_to_rotate_by(
    language_model: Any, position_ids: torch.Tensor | None, cut: SequenceCut
) -> torch.Tensor:
    """Position ids for a multimodal rotary embedding: [3, B, S / cp]; packed, [3, 1, T].

    Args:
        language_model: has an embedding that :func:`leave_cutting_to_the_model` has prepared.
        position_ids: long [3, B, S], or [B, S] for three equal axes; uncut.
        cut: how this micro-batch is cut.

    Raises:
        InputError: no position ids, or of another shape.
        UnsupportedError: fused rotation of a packed sequence.
    """
    if position_ids is not None and position_ids.dim() == 2:
        position_ids = position_ids.expand(_AXES, -1, -1)
    if position_ids is None or position_ids.dim() != 3 or position_ids.size(0) != _AXES:
        got = "None" if position_ids is None else f"of shape {list(position_ids.shape)}"
        raise InputError(
            f"position_ids are {got}; multimodal RoPE takes [3, B, S] (time, height, width), or "
            "[B, S] where they are equal, on every pipeline stage"
        )
    if cut.places is None:
        return cut.context_share(position_ids)
    # The rotation of packed sequences cuts the whole row's rotary embedding document by document.
    if unwrap_model(language_model).config.apply_rope_fusion:
        raise UnsupportedError(_fusion_message("packing_kwargs"))
    return position_ids


def _fusion_message(what: str) -> str:
    return (
        f"{what} with multimodal RoPE and apply_rope_fusion: the fused rotation of packed "
        "sequences counts positions from the start of each document; set apply_rope_fusion=False "
        "(--no-rope-fusion)"
    )
