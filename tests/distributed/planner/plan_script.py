"""A program: ``python -m megatron.mimo.plan`` in a process that has imported Megatron."""

import sys

from megatron.mimo.planner.command import main

if __name__ == "__main__":
    sys.exit(main())
