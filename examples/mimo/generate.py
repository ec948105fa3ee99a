"""Ask a checkpoint about images, videos and recordings; the answer appears as it is made.

    python examples/mimo/generate.py --checkpoint llava-7b --image cat.png --prompt "What is this?"
    torchrun --nproc-per-node 2 examples/mimo/generate.py --tensor-model-parallel-size 2 ...

``--checkpoint`` is what ``python -m megatron.mimo.convert import`` or a training run has written.
"""

import sys

if __name__ == "__main__":
    try:
        from megatron.mimo.inference import main
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("megatron", "torch"):
            raise
        sys.exit(f"error: {error.name} is not installed; run `make setup` in the repository first")
    sys.exit(main())
