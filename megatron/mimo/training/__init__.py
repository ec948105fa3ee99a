"""The training layer: recipes on Megatron's own ``pretrain``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from megatron.mimo.arguments.early import asks_for_recipes, list_recipes
from megatron.mimo.process.importing import importing_megatron
from megatron.mimo.process.launcher import LaunchError, join_job, set_threads

__all__ = ["main"]

_REFUSED = 2  # exit code: as for wrong arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Train a recipe; see ``megatron.mimo.training.run.main``.

    Which job the process belongs to, and its threads, are settled before PyTorch is imported, and
    recipes are listed without it.
    """
    if asks_for_recipes(sys.argv[1:] if argv is None else argv):
        if os.environ.get("RANK", "0") == "0":
            print(list_recipes())
        return 0
    try:
        join_job()
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return _REFUSED
    set_threads()
    with importing_megatron():
        # after the threads are set, and once the backend is selected
        from megatron.mimo.training import run

    return run.main(argv)
