"""Keeps what Megatron prints, logs and warns about off the screen; ``--verbose`` brings it back."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

__all__ = ["at_level", "quiet_imports", "stdout", "warnings_shown"]


@contextmanager
def stdout(*, shown: bool) -> Iterator[None]:
    """Let what Megatron prints reach the screen, or not; ``Console`` keeps the real stream."""
    if shown:
        yield
        return
    with redirect_stdout(_Nowhere()):
        yield


class _Nowhere(io.TextIOBase):
    def write(self, text: str) -> int:
        return len(text)


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Hide warnings while Megatron is imported; without Transformer Engine there are a dozen."""
    name = "torch.utils.cpp_extension"  # "No CUDA runtime is found"
    with at_level(name, logging.ERROR), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def at_level(name: str, level: int) -> Iterator[None]:
    """Give a logger this level within the block."""
    logger = logging.getLogger(name)
    before = logger.level
    _set_level(logger, level)
    try:
        yield
    finally:
        _set_level(logger, before)


def _set_level(logger: logging.Logger, level: int) -> None:
    """Set a level only if it differs: setting one clears the caches of thousands of loggers."""
    if logger.level != level:
        logger.setLevel(level)


@contextmanager
def warnings_shown(*, shown: bool) -> Iterator[None]:
    """Warnings of Megatron, torch and Transformer Engine during a run: on the screen or nowhere.

    What this project's own modules log stays on the screen.
    """
    if shown:
        yield
        return
    with at_level("megatron", logging.ERROR), warnings.catch_warnings():
        _set_level(logging.getLogger("megatron.mimo"), logging.WARNING)
        warnings.filterwarnings("ignore", module=r"megatron\.(core|training)\b")
        warnings.filterwarnings("ignore", module=r"torch\b")
        warnings.filterwarnings("ignore", module=r"transformer_engine\b")
        yield
