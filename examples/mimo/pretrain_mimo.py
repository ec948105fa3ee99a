"""Train a multimodal model: choose a recipe, and let Megatron's ``pretrain`` do the rest.

    python -m megatron.mimo.process.launch --nproc-per-node 2 examples/mimo/pretrain_mimo.py
    python examples/mimo/pretrain_mimo.py --recipe digits --train-iters 200

Without flags it trains the recipe ``digits`` into ``runs/digits/``. Every Megatron flag works and
wins over the recipe; ``--list-recipes`` and ``--help`` say more.
"""

import sys

# Checkpoint writers start processes that import this file again: nothing may run on import.
if __name__ == "__main__":
    try:
        from megatron.mimo.training import main
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("megatron", "torch"):
            raise
        sys.exit(f"error: {error.name} is not installed; run `make setup` in the repository first")
    sys.exit(main())
