"""The training layer: recipes on Megatron's own ``pretrain``."""

from __future__ import annotations

from collections.abc import Sequence

from megatron.mimo.training.quiet import quiet_imports

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Train a recipe; see ``megatron.mimo.training.run.main``."""
    with quiet_imports():
        from megatron.mimo.training import run
    return run.main(argv)
