"""Reads what has to be known before Megatron is imported, which takes seconds."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from megatron.mimo.arguments.stall import STALL_TIMEOUT, seconds
from megatron.mimo.recipes import DEFAULT_RECIPE, recipe_summaries

__all__ = ["EarlyArguments", "asks_for_recipes", "list_recipes", "parse_early", "read_config"]


class EarlyArguments(argparse.Namespace):
    """The flags that are read before Megatron is imported."""

    recipe: str
    config: dict[str, Any]
    stall_timeout: float


def parse_early(argv: Sequence[str] | None = None) -> EarlyArguments:
    """Read ``--recipe``, ``--stall-timeout`` and the ``--config`` file; imports no Megatron.

    Raises:
        ConfigError: the configuration file cannot be read.
    """
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe")
    parser.add_argument("--config")
    parser.add_argument("--stall-timeout", type=seconds)
    given, _ = parser.parse_known_args(argv)
    config = read_config(Path(given.config)) if given.config else {}
    recipe = given.recipe or config.get("recipe") or DEFAULT_RECIPE
    stall_timeout = given.stall_timeout
    if stall_timeout is None and "stall_timeout" in config:
        words = [f"--stall-timeout={config['stall_timeout']}"]
        stall_timeout = parser.parse_known_args(words)[0].stall_timeout
    return EarlyArguments(
        recipe=recipe,
        config=config,
        stall_timeout=STALL_TIMEOUT if stall_timeout is None else stall_timeout,
    )


def list_recipes() -> str:
    """The text ``--list-recipes`` prints; loads none of them."""
    summaries = recipe_summaries()
    width = max(map(len, summaries))
    return "\n".join(f"{name:<{width}}  {summary}" for name, summary in summaries.items())


def read_config(path: Path) -> dict[str, Any]:
    """Read a configuration file: a YAML mapping of flag names (``-`` or ``_``) to values.

    Raises:
        ConfigError: missing, not YAML, not a mapping, or a key given twice.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise _error(f"--config {path}: cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        text = " ".join(str(error).split())
        raise _error(f"--config {path}: not valid YAML: {text}") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise _error(
            f"--config {path}: expected a mapping of flag names to values, "
            f"got {type(content).__name__}"
        )
    flat: dict[str, Any] = {}
    for key, value in content.items():
        name = key.replace("-", "_")
        if name in flat:
            raise _error(f"--config {path}: {key!r} is given twice")
        flat[name] = value
    return flat


def asks_for_recipes(argv: Sequence[str]) -> bool:
    """Whether a command line has ``--list-recipes``."""
    return "--list-recipes" in argv


class _Parser(argparse.ArgumentParser):
    """A parser that raises an error where argparse would end the process."""

    def error(self, message: str) -> NoReturn:
        raise _error(message)


def _error(message: str) -> Exception:
    # Its package is Megatron's; a run that is not refused imports that later, and quietly.
    from megatron.core.models.mimo.errors import ConfigError

    return ConfigError(message)
