"""What a run reads, and in which proportions: the values behind --data-path and --data-mixture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from megatron.core.models.mimo.errors import ConfigError

__all__ = ["MixtureSpec", "SourceSpec", "read_mixture"]

ORDERS = ("auto", "indexed", "streaming")


@dataclass(frozen=True, kw_only=True)
class SourceSpec:
    """Files that are drawn from together.

    Attributes:
        name: what the log calls it.
        paths: files, folders and patterns.
        weight: its share of the draws, among the weights of all sources that are not used up.
        epochs: passes over it; None for as many as the run asks for.
        limit: draws; None for no limit.
        media_folder: what paths in records are relative to; None for the folder of their file.
        order: "indexed" (any record may come at any time), "streaming" (files one after the other
            through a buffer), or "auto": streaming for tars, parquet and Energon.

    Raises:
        ConfigError: numbers or words that make no sense.
    """

    name: str
    paths: Sequence[str]
    weight: float = 1.0
    epochs: float | None = None
    limit: int | None = None
    media_folder: str | None = None
    order: str = "auto"

    def __post_init__(self) -> None:
        where = f"source {self.name!r}"
        if not self.paths:
            raise ConfigError(f"{where} has no paths; name its files")
        _check_weight(where, self.weight)
        for name in ("epochs", "limit"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and 0 < value < math.inf):
                raise ConfigError(f"{where}: {name} is {value!r}; expected more than 0")
        if self.limit is not None and not isinstance(self.limit, int):
            raise ConfigError(f"{where}: limit is {self.limit!r}; expected a number of samples")
        if self.media_folder is not None and not Path(self.media_folder).is_dir():
            raise ConfigError(f"{where}: media_folder {self.media_folder} is no folder; correct it")
        if self.order not in ORDERS:
            raise ConfigError(
                f"{where}: order is {self.order!r}; expected {', '.join(ORDERS[:-1])} or "
                f"{ORDERS[-1]}"
            )


@dataclass(frozen=True, kw_only=True)
class MixtureSpec:
    """Sources, and when their weights change.

    Attributes:
        sources: at least one, each with a name of its own.
        changes: pairs of a training step and the weights from that step on, by name of the
            source; those that are not named keep theirs. In the order of the steps.

    Raises:
        ConfigError: names that are twice or nowhere, steps out of order, weights that are all 0.
    """

    sources: Sequence[SourceSpec]
    changes: Sequence[tuple[Any, Mapping[str, float]]] = ()

    def __post_init__(self) -> None:
        names = [source.name for source in self.sources]
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"the mixture has sources {names}; expected names, each once")
        last = 0
        for step, weights in self.changes:
            if not isinstance(step, int) or step <= last:
                raise ConfigError(
                    f"weights change at step {step!r}; expected a step after {last}: list the "
                    "changes in their order"
                )
            unknown = sorted(set(weights) - set(names))
            if unknown:
                raise ConfigError(f"step {step} names {unknown}; expected some of {names}")
            for name, weight in weights.items():
                _check_weight(f"source {name!r} at step {step}", weight)
            last = step
        for step in (1, *(step for step, _ in self.changes)):
            if not any(self.weights(step)):
                raise ConfigError(f"at step {step} all weights are 0; expected one that is not")

    def weights(self, step: int) -> list[float]:
        """The weight of each source at a training step, from 1."""
        now = {source.name: float(source.weight) for source in self.sources}
        for first, weights in self.changes:
            if first <= step:
                now.update({name: float(weight) for name, weight in weights.items()})
        return [now[source.name] for source in self.sources]


def read_mixture(path: Path) -> MixtureSpec:
    """The mixture that a YAML file describes; ``docs/sources.md`` shows one.

    Relative paths of sources are relative to the file's folder.

    Raises:
        ConfigError: it cannot be read, or holds what is no mixture.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        text = " ".join(str(error).split())
        raise ConfigError(f"--data-mixture {path} cannot be read: {text}") from error
    _check_keys(f"--data-mixture {path}", content, ("sources", "changes"), needed="sources")
    if not isinstance(content["sources"], dict):
        raise ConfigError(f"--data-mixture {path}: sources are to be names with their settings")
    known = tuple(field.name for field in fields(SourceSpec) if field.name != "name")
    sources = []
    for name, given in content["sources"].items():
        settings = {"paths": given} if isinstance(given, str | list) else given
        _check_keys(f"{path}, source {name!r}", settings, known, needed="paths")
        paths = settings["paths"]
        paths = [paths] if isinstance(paths, str) else paths
        if not isinstance(paths, list) or not all(isinstance(one, str) for one in paths):
            raise ConfigError(f"{path}, source {name!r}: paths are {paths!r}; expected file names")
        placed = [str(path.parent / one) for one in paths]
        folder: Any = settings.get("media_folder")
        folder = folder if folder is None else str(path.parent / str(folder))
        made = {**settings, "media_folder": folder}
        sources.append(SourceSpec(**{**made, "name": str(name), "paths": placed}))
    changes = []
    for number, change in enumerate(content.get("changes") or []):
        where = f"{path}, change {number + 1}"
        _check_keys(where, change, ("step", "weights"), needed="weights")
        if not isinstance(change["weights"], dict):
            raise ConfigError(f"{where}: weights are {change['weights']!r}; expected them by name")
        changes.append((change.get("step"), change["weights"]))
    return MixtureSpec(sources=sources, changes=changes)


def _check_keys(where: str, value: Any, known: Sequence[str], *, needed: str) -> None:
    if not isinstance(value, dict) or needed not in value:
        raise ConfigError(f"{where}: expected {needed!r} and what belongs to it, got {value!r}")
    unknown = sorted(str(key) for key in value if key not in known)
    if unknown:
        raise ConfigError(f"{where}: unknown {', '.join(unknown)}; expected {', '.join(known)}")


def _check_weight(where: str, weight: Any) -> None:
    if not _is_number(weight) or not 0 <= weight < math.inf:
        raise ConfigError(f"{where}: weight is {weight!r}; expected a number of at least 0")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
