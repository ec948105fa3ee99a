"""``python -m megatron.mimo.data inspect``; see docs/data.md."""

import importlib
import sys

from megatron.mimo.process.quiet import quiet_imports

if __name__ == "__main__":
    with quiet_imports():
        # the command knows models and recipes, which lie above the data: it is named, not imported
        command = importlib.import_module("megatron.mimo.inspection.command")
    sys.exit(command.main())
