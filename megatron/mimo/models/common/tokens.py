"""Token ids and labels of one conversation, as every family reads them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron.core.models.mimo.errors import InputError

__all__ = ["labels_or", "read_tokens", "runs_of"]


def read_tokens(
    features: Mapping[str, Tensor], *media: str, name: str
) -> tuple[Tensor, dict[str, Tensor]]:
    """The token ids [L] of one conversation, and its media arguments.

    Args:
        features: in Hugging Face's form; an ``attention_mask`` that hides nothing is let through.
        media: names of the family's media arguments.
        name: of the sample, for errors.

    Raises:
        InputError: another batch size than 1, hidden tokens, unknown arguments.
    """
    given = dict(features)
    tokens, mask = given.pop("input_ids", None), given.pop("attention_mask", None)
    if tokens is None or tokens.dim() != 2 or len(tokens) != 1:
        got = "missing" if tokens is None else f"of shape {list(tokens.shape)}"
        raise InputError(f"sample {name}: input_ids are {got}; expected one conversation, [1, L]")
    if mask is not None and not bool(mask.all()):
        raise InputError(
            f"sample {name}: attention_mask hides tokens; give one conversation without padding"
        )
    unknown = sorted(set(given) - set(media))
    if unknown:
        raise InputError(
            f"sample {name}: features {unknown} are not known to this model; expected input_ids "
            f"and {', '.join(media)}"
        )
    return tokens[0].long(), given


def labels_or(is_label: Tensor | None, tokens_L: Tensor, placeholder: int) -> Tensor:
    """``is_label``, or by default every token that is not a placeholder."""
    return tokens_L != placeholder if is_label is None else is_label


def runs_of(tokens_L: Tensor, token: int) -> list[int]:
    """The lengths of a token's runs, in order."""
    is_token_L = (tokens_L == token).int()
    edges = torch.diff(is_token_L, prepend=is_token_L.new_zeros(1), append=is_token_L.new_zeros(1))
    starts, stops = (edges == 1).nonzero(), (edges == -1).nonzero()
    lengths: list[int] = (stops - starts).flatten().tolist()
    return lengths
