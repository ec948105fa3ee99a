"""From the parsed arguments of a run to the settings of its language model."""

from __future__ import annotations

from argparse import Namespace

from megatron.mimo.models.common.settings import LanguageSettings
from megatron.training.argument_utils import core_transformer_config_from_args

__all__ = ["language_settings"]


def language_settings(args: Namespace) -> LanguageSettings:
    """What a run's language model is built of.

    Args:
        args: parsed and validated, with ``padded_vocab_size``.
    """
    return LanguageSettings(
        transformer=core_transformer_config_from_args(args),
        tokens=args.vocab_size,
        padded_tokens=args.padded_vocab_size,
        max_positions=args.max_position_embeddings,
        position_embedding=args.position_embedding_type,
        rotary_base=args.rotary_base,
        rotary_percent=args.rotary_percent,
        rope_scaling_factor=args.rope_scaling_factor if args.use_rope_scaling else None,
        ties_output=not args.untie_embeddings_and_output_weights,
        whole_logits=args.whole_logits * 2**20,
        expert_balance=args.router_aux_loss_coef or 0.0,
    )
