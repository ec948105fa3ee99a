"""What a sample costs to train on, for balance: floating-point operations, roughly.

Only the proportions matter. Backward costs twice what forward does, where parameters are trained;
encoders that are frozen have none.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from megatron.mimo.data.global_batches.balance import CostModel

__all__ = ["cost_model"]


def cost_model(args: Namespace, config: Any) -> CostModel:
    """The work of a model.

    Args:
        args: Megatron's, with the language model's sizes.
        config: of Hugging Face, with those of the encoders.
    """
    hidden, layers = args.hidden_size, args.num_layers
    feed_forward = (3 if args.swiglu else 2) * hidden * args.ffn_hidden_size
    experts = getattr(args, "moe_router_topk", None) if args.num_experts else None
    matrices = 4 * hidden * hidden + feed_forward * (experts or 1)
    return CostModel(
        per_token=3 * (2 * layers * matrices + 2 * hidden * args.padded_vocab_size),
        per_pair=3 * 4 * layers * hidden,
        encoders={
            **_encoder(args, "images", getattr(config, "vision_config", None)),
            **_encoder(args, "audio", getattr(config, "audio_config", None)),
        },
    )


def _encoder(args: Namespace, modality: str, config: Any) -> dict[str, tuple[float, float]]:
    """Operations for each row and for each pair of rows of a medium."""
    hidden = _first(config, "hidden_size", "d_model")
    layers = _first(config, "num_hidden_layers", "depth", "encoder_layers")
    feed_forward = _first(config, "intermediate_size", "encoder_ffn_dim")
    if not hidden or not layers:
        return {}
    frozen = {modality, f"{modality}.encoders"} & set(args.freeze or ())
    passes = 1 if frozen else 3
    # patches that are merged into one row, where a picture's patches all see each other
    merged = (_first(config, "spatial_merge_size") or 0) ** 2
    matrices = 4 * hidden * hidden + 2 * hidden * (feed_forward or 4 * hidden)
    per_row = passes * 2 * layers * matrices * (merged or 1)
    per_pair = passes * 4 * layers * hidden * merged**2
    return {modality: (float(per_row), float(per_pair))}


def _first(config: Any, *names: str) -> int | None:
    found = (getattr(config, name, None) for name in names)
    return next((value for value in found if isinstance(value, int)), None)
