"""Generation: batches of prompts with media, a cache of keys and values, any layout.

``Generator`` continues samples of token ids; ``assistant.open_assistant`` loads a checkpoint that
answers conversations in text. Megatron is imported when one of the names is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from megatron.mimo.process.importing import importing_megatron

if TYPE_CHECKING:
    from megatron.mimo.inference.generator import Generator
    from megatron.mimo.inference.sampling import SamplingOptions

__all__ = ["Generator", "SamplingOptions", "main"]

_MODULES = {"Generator": "generator", "SamplingOptions": "sampling"}


def main(argv: Sequence[str] | None = None) -> int:
    """Ask a checkpoint; see ``megatron.mimo.inference.command.main``."""
    with importing_megatron():
        # while warnings are off, and once the backend is selected
        from megatron.mimo.inference import command

    return command.main(argv)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
