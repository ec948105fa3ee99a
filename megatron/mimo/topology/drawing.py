"""A drawing of who runs what, for a terminal."""

from __future__ import annotations

from collections.abc import Mapping

from megatron.mimo.topology.components import AXES, LANGUAGE, Component

__all__ = ["draw"]

_PER_BLOCK = 8  # ranks side by side


def draw(components: Mapping[str, Component]) -> str:
    """A table with a column for each rank and, for each module, where the rank stands in it.

    Args:
        components: by name.
    """
    ranks = sorted({rank for component in components.values() for rank in component.ranks})
    width = max(len(name) for name in components)
    lines = [_summary(component) for component in components.values()]
    for start in range(0, len(ranks), _PER_BLOCK):
        block = ranks[start : start + _PER_BLOCK]
        rows = [["rank".ljust(width), *map(str, block)]]
        for name, component in components.items():
            cells = [_cell(component, rank) for rank in block]
            rows.append([name.ljust(width), *cells])
        sizes = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines.append("")
        for row in rows:
            cells = [cell.ljust(size) for cell, size in zip(row, sizes, strict=True)]
            lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _summary(component: Component) -> str:
    sizes = " x ".join(f"{axis} {getattr(component, axis)}" for axis in AXES)
    what = "the language model" if component.name == LANGUAGE else "encoders and projection"
    return (
        f"{component.name}: {sizes} on ranks {component.ranks.start} to "
        f"{component.ranks.stop - 1} ({what})"
    )


def _cell(component: Component, rank: int) -> str:
    if rank not in component.ranks:
        return "-"
    index, parts = rank - component.rank_offset, []
    for axis in AXES:
        size = getattr(component, axis)
        if size > 1:
            parts.append(f"{axis}{index % size}")
        index //= size
    return " ".join(parts) or "whole"
