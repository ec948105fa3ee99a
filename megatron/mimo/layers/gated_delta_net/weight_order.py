"""The order of the layer's weights: by key heads, so that parallelism cuts them in plain pieces.

Published checkpoints hold all queries, then all keys, all values and so on. Here the rows of key
head 0 come first: its query, its key, the values (and gates) of the value heads that belong to it;
then those of key head 1. A tensor-parallel or context-parallel rank's share is then one run of
rows, and checkpoints change between layouts without being rearranged.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["group_rows", "ungroup_rows"]


def group_rows(sections: Sequence[Tensor], groups: int) -> Tensor:
    """Sections [G * n_i, ...] (all queries, all keys, ...) as one tensor, ordered by key heads.

    Args:
        sections: each with the same number of rows for each key head, in the order of heads.
        groups: G, key heads.
    """
    parts = [section.unflatten(0, (groups, -1)) for section in sections]
    return torch.cat(parts, dim=1).flatten(0, 1)


def ungroup_rows(rows: Tensor, sizes: Sequence[int], groups: int) -> list[Tensor]:
    """The sections again, each [G * n_i, ...].

    Args:
        rows: [G * sum(n_i), ...], ordered by key heads.
        sizes: n_i, rows of one key head in each section.
        groups: G, key heads.
    """
    parts = rows.unflatten(0, (groups, -1)).split(list(sizes), dim=1)
    return [part.flatten(0, 1) for part in parts]
