"""Which keys a query may attend to, as a rule over positions; S queries, K keys, B micro-batch.

A rule instead of a mask: it can be asked about blocks of positions, so that no [S, S] mask exists,
and it holds for sequences of which each rank has a part.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Relation", "Visibility"]


class Relation(enum.Enum):
    """What a block of queries sees of a block of keys."""

    NOTHING = enum.auto()
    PART = enum.auto()
    ALL = enum.auto()


@dataclass(frozen=True, kw_only=True)
class Visibility:
    """Which keys j of its document a query i attends to, by the distance of their positions.

    Attributes:
        behind: sees keys from ``i - behind`` on; None: from the first.
        ahead: sees keys up to ``i + ahead``; None: to the last. 0 is causal.
        spans: tokens also carry a span number, and those of one span (an image, say; 0 is no
            span) see each other in both directions, whatever ``behind`` and ``ahead`` say.
    """

    behind: int | None = None
    ahead: int | None = None
    spans: bool = False

    @classmethod
    def of(
        cls, *, causal: bool, window: tuple[int, int] | None = None, spans: bool = False
    ) -> Visibility:
        """From Megatron's settings: ``window_size = (left, right)``, where -1 is no limit."""
        left, right = window if window is not None else (-1, -1)
        behind = left if left >= 0 else None
        ahead = right if right >= 0 else None
        return cls(behind=behind, ahead=0 if causal else ahead, spans=spans)

    @property
    def is_plain(self) -> bool:
        """Causal or full, nothing else."""
        return self.behind is None and self.ahead in (None, 0) and not self.spans

    def relation(self, queries: range, keys: range) -> Relation:
        """What queries at these positions of a document see of keys at those; both not empty."""
        least, most = keys[0] - queries[-1], keys[-1] - queries[0]
        if (self.behind is None or least >= -self.behind) and (
            self.ahead is None or most <= self.ahead
        ):
            return Relation.ALL
        beyond = (self.behind is not None and most < -self.behind) or (
            self.ahead is not None and least > self.ahead
        )
        return Relation.NOTHING if beyond and not self.spans else Relation.PART

    def visible_keys(self, queries: range, keys: range) -> range:
        """The smallest range of ``keys`` that holds every key which any of ``queries`` sees.

        Args:
            queries: positions in a document.
            keys: positions in the same document.

        Returns:
            A part of ``keys``, empty where none is seen. With spans, all of ``keys``: which tokens
            share a span is not known here.
        """
        if self.spans:
            return keys
        start = keys.start if self.behind is None else max(keys.start, queries[0] - self.behind)
        stop = keys.stop if self.ahead is None else min(keys.stop, queries[-1] + self.ahead + 1)
        return range(start, max(start, stop))

    def allowed(
        self,
        queries_S: Tensor,
        keys_K: Tensor,
        query_spans_BS: Tensor | None = None,
        key_spans_BK: Tensor | None = None,
    ) -> Tensor:
        """The rule for every pair: bool [B, S, K], B = 1 without spans; True where seen.

        Args:
            queries_S: positions in the document, integer.
            keys_K: likewise.
            query_spans_BS: span numbers, integer; None is no spans.
            key_spans_BK: likewise.
        """
        distance_SK = keys_K[None, :] - queries_S[:, None]
        seen_SK = torch.ones_like(distance_SK, dtype=torch.bool)
        if self.behind is not None:
            seen_SK &= distance_SK >= -self.behind
        if self.ahead is not None:
            seen_SK &= distance_SK <= self.ahead
        if query_spans_BS is None or key_spans_BK is None:
            return seen_SK[None]
        same_BSK = query_spans_BS[:, :, None] == key_spans_BK[:, None, :]
        return (same_BSK & (query_spans_BS != 0)[:, :, None]) | seen_SK
