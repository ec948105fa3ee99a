"""What a layout recomputes in backward, as settings of Megatron's configuration."""

from __future__ import annotations

from typing import Any

# What is recomputed selectively, by the name of it in a layout.
RECOMPUTED: dict[str, tuple[str, ...]] = {
    "selective": ("core_attn",),
    "mlp": ("mlp",),
    "layernorm": ("layernorm",),
    "dense-modules": ("core_attn", "layernorm", "mlp"),
    "moe": ("moe",),
    "shared_experts": ("shared_experts",),
    "moe-modules": ("core_attn", "layernorm", "mlp", "moe"),
    "mla_up_proj": ("mla_up_proj",),
    "mla-modules": ("core_attn", "layernorm", "mlp", "mla_up_proj"),
}


def recompute_settings(name: str) -> dict[str, Any]:
    """Of a key of ``RECOMPUTED``, "uniform", "block", "projections" or ""."""
    if name in RECOMPUTED:
        return {"recompute_granularity": "selective", "recompute_modules": list(RECOMPUTED[name])}
    if name in ("uniform", "block"):
        return {
            "recompute_granularity": "full",
            "recompute_method": name,
            "recompute_num_layers": 1,
        }
    assert name in ("", "projections"), name
    return {}
