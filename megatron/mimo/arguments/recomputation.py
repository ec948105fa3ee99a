"""Refuses recomputation that would have no effect or that Megatron cannot do, before any work.

Part of ``layout``: the same message on every rank, in the first second.
"""

from __future__ import annotations

import difflib
from argparse import Namespace

from megatron.core.models.mimo.errors import ConfigError

__all__ = ["MODULES", "check_recomputation"]

MODULES = (
    "core_attn",
    "layernorm",
    "mlp",
    "moe",
    "shared_experts",
    "moe_act",
    "mla_up_proj",
    "gdn_norm_out",
)
"""What megatron-core's ``--recompute-modules`` knows."""


def check_recomputation(args: Namespace) -> None:
    """Check what is recomputed against the granularity and the model's layers.

    Args:
        args: parsed, not yet validated by Megatron.

    Raises:
        ConfigError: naming the flag and what it lacks.
    """
    asked = list(args.recompute_modules or ())
    given = f"--recompute-modules {' '.join(asked)}"
    granularity = "selective" if args.recompute_activations else args.recompute_granularity
    if granularity == "full" and args.recompute_method is None:
        raise ConfigError(
            "--recompute-granularity full without --recompute-method; add --recompute-method "
            "uniform --recompute-num-layers 1"
        )
    if not asked:
        return
    for name in asked:
        if name not in MODULES:
            near = difflib.get_close_matches(name, MODULES, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{given}: expected some of {', '.join(MODULES)}{hint}")
    if granularity == "full":
        raise ConfigError(
            f"{given} with --recompute-granularity full, which recomputes whole layers; leave one "
            "of them away"
        )
    if granularity is None:
        raise ConfigError(
            f"{given} has no effect without --recompute-granularity selective; add it"
        )
    for name in asked:
        lacks = _lacking(name, args)
        if lacks:
            raise ConfigError(f"--recompute-modules {name} {lacks}; leave {name} away")


def _lacking(name: str, args: Namespace) -> str:
    """Why ``name`` would have no effect or fail; "" where it has one."""
    with_te = args.transformer_impl == "transformer_engine"
    latent = args.multi_latent_attention
    experts = bool(args.num_experts)
    reasons = {
        "layernorm": (
            with_te and not experts and not latent,
            "has no effect: Transformer Engine's layers compute norm and projection together",
        ),
        "moe": (not experts, "without experts (--num-experts)"),
        "shared_experts": (
            not experts or not args.moe_shared_expert_intermediate_size,
            "without shared experts (--num-experts, --moe-shared-expert-intermediate-size)",
        ),
        "moe_act": (
            not (experts and args.moe_grouped_gemm and with_te),
            "needs the grouped experts of Transformer Engine (--num-experts, --moe-grouped-gemm)",
        ),
        "mla_up_proj": (
            not latent,
            "without multi-latent attention (--multi-latent-attention)",
        ),
        "gdn_norm_out": (
            True,
            "is for megatron-core's own gated delta net; of this project's, whose norm keeps its "
            "inputs alone, whole layers are recomputed (--recompute-granularity full)",
        ),
    }
    applies, reason = reasons.get(name, (False, ""))
    if not applies and name == "shared_experts" and args.moe_shared_expert_overlap:
        return "with --moe-shared-expert-overlap, which computes them beside communication"
    return reason if applies else ""
