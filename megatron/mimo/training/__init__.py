"""The training layer: recipes on Megatron's own ``pretrain``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from megatron.mimo.arguments.early import asks_for_recipes, list_recipes
from megatron.mimo.process.collector import uncollected
from megatron.mimo.process.launcher import LaunchError, join_job, set_threads
from megatron.mimo.process.quiet import quiet_imports

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
    with quiet_imports(), uncollected():
        # after the threads are set, and while warnings are off
        from megatron.mimo.backend import select_backend

        select_backend()
        # once the backend is selected: on a CPU Megatron leaves torch's compiler out, two seconds
        from megatron.mimo.training import run

    return run.main(argv)
