"""Keeps what Megatron prints, logs and warns about off the screen; ``--verbose`` brings it back."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

__all__ = ["quiet_imports", "stdout", "warnings_shown"]


@contextmanager
def stdout(*, shown: bool) -> Iterator[None]:
    """What Megatron prints, on the screen or nowhere; ``Console`` keeps the real stream."""
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
    """Importing Megatron without Transformer Engine warns in a dozen places."""
    logger = logging.getLogger("torch.utils.cpp_extension")  # "No CUDA runtime is found"
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logger.setLevel(level)


@contextmanager
def warnings_shown(*, shown: bool) -> Iterator[None]:
    """Warnings of Megatron, torch and Transformer Engine during a run: on the screen or nowhere.

    What this project's own modules log stays on the screen.
    """
    if shown:
        yield
        return
    logger = logging.getLogger("megatron")
    level = logger.level
    logger.setLevel(logging.ERROR)
    logging.getLogger("megatron.mimo").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"megatron\.(core|training)\b")
        warnings.filterwarnings("ignore", module=r"torch\b")
        warnings.filterwarnings("ignore", module=r"transformer_engine\b")
        try:
            yield
        finally:
            logger.setLevel(level)
