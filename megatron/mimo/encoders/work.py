"""What an encoder does for a call, as numbers that are known on the host: for counting FLOPs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["EncoderWork"]


@dataclass(frozen=True, kw_only=True)
class EncoderWork:
    """How often the parts of an encoder run.

    A part is named by its path within the encoder ("transformer", "transformer.layers.3"); the
    longest path that leads to a module is the one that counts for it.

    Attributes:
        vectors: part -> vectors that its weights are multiplied with.
        pairs: part -> pairs of a query and a key in each of its attentions.
        rows: that the encoder gives.
    """

    vectors: Mapping[str, int]
    pairs: Mapping[str, int] = field(default_factory=dict)
    rows: int
