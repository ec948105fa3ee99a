"""Packages that only some of the library needs."""

from __future__ import annotations

import importlib

from megatron.mimo.backend.own_library import ConfigError

__all__ = ["require_hugging_face"]


def require_hugging_face(what: str) -> None:
    """Refuse to go on without transformers and safetensors.

    Args:
        what: needs them, in the plural.

    Raises:
        ConfigError: one of them cannot be imported.
    """
    for package in ("transformers", "safetensors"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ConfigError(
                f"{what} need {package}, which cannot be imported ({error}); "
                "pip install 'megatron-mimo[hf]'"
            ) from error
