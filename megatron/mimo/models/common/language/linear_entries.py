"""Which parameter of a gated delta net is which weight of transformers.

transformers has all queries, then all keys, then all values in one projection, and three others
for gates. Ours has one, key head by key head, so that tensor parallelism cuts it in one piece.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, cat

from megatron.mimo.layers.gated_delta_net.weight_order import group_rows, ungroup_rows
from megatron.mimo.models.common.keys import KeyEntry
from megatron.mimo.models.common.language.kinds import linear_layers

__all__ = ["GroupedRows", "linear_entries"]


@dataclass(frozen=True, kw_only=True)
class GroupedRows:
    """Weights whose rows belong to key heads, put together head by head.

    Attributes:
        groups: key heads.
        sections: rows of each of transformers' weights, section by section; each section has the
            rows of all heads, one head behind the other.
    """

    groups: int
    sections: tuple[tuple[int, ...], ...]

    def to_mimo(self, parts: Sequence[Tensor]) -> Tensor:
        """[rows, ...] each -> [all rows, ...], those of a head together."""
        split: list[Tensor] = []
        for part, rows in zip(parts, self.sections, strict=True):
            split += part.split(list(rows))
        return group_rows(split, self.groups)

    def to_hf(self, tensor: Tensor) -> list[Tensor]:
        """The inverse."""
        sizes = [rows // self.groups for weight in self.sections for rows in weight]
        split = iter(ungroup_rows(tensor, sizes, self.groups))
        return [cat([next(split) for _ in weight]) for weight in self.sections]


def linear_entries(text: Any, entry: Callable[..., KeyEntry]) -> list[KeyEntry]:
    """Entries of the linear layers; ``entry(mimo, *hf, transform=, layers=)`` makes one."""
    layers = linear_layers(text)
    if not layers:
        return []
    groups, heads = text.linear_num_key_heads, text.linear_num_value_heads
    keys, values = groups * text.linear_key_head_dim, heads * text.linear_value_head_dim
    mixed = (keys, keys, values)
    inward = GroupedRows(groups=groups, sections=(mixed, (values,), (heads,), (heads,)))
    channels = GroupedRows(groups=groups, sections=(mixed,))
    projections = tuple(f"linear_attn.in_proj_{part}.weight" for part in ("qkv", "z", "b", "a"))
    ours, theirs = "self_attention.", "linear_attn."

    def same(name: str) -> KeyEntry:
        return entry(ours + name, theirs + name, layers=layers)

    conv = "conv1d.weight"
    return [
        entry(ours + "in_proj.weight", *projections, transform=inward, layers=layers),
        entry(ours + conv, theirs + conv, transform=channels, layers=layers),
        *map(same, ("A_log", "dt_bias", "norm.weight", "out_proj.weight")),
    ]
