"""``python -m megatron.mimo.backend``: what this project replaces in other packages, and why."""

import sys

from megatron.mimo.backend.registry import describe

sys.stdout.write(describe())
