"""``python -m megatron.mimo.plan``: what a run takes, before it starts; see docs/planning.md."""

import sys

from megatron.mimo.process.quiet import quiet_imports

if __name__ == "__main__":
    with quiet_imports():
        # while warnings are off
        from megatron.mimo.planner.command import main
    sys.exit(main())
