"""What the backend takes from this project's MIMO.

Scripts that run on megatron-core's own (``MEGATRON_MIMO_OVERLAY=0``) need the backend on a CPU all
the same, and find stand-ins here.
"""

from __future__ import annotations

__all__ = ["WITHOUT_EXTRA_STATE", "ConfigError"]

try:
    from megatron.core.models.mimo.errors import ConfigError
    from megatron.core.models.mimo.submodules.state import WITHOUT_EXTRA_STATE
except ModuleNotFoundError:
    ConfigError = ValueError  # type: ignore[assignment, misc]
    WITHOUT_EXTRA_STATE = "for modules of this project alone"
