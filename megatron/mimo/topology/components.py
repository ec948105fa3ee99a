"""Components: the sizes and ranks of every module that has a parallel layout of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches

from megatron.core.models.mimo.config import MIMO_LANGUAGE_MODULE_KEY
from megatron.core.models.mimo.errors import ConfigError, UnsupportedError

__all__ = ["AXES", "LANGUAGE", "Component", "check_components", "parse_component"]

LANGUAGE = MIMO_LANGUAGE_MODULE_KEY
AXES = ("tp", "cp", "dp", "pp")  # the order in which ranks are dealt out, as Megatron's default
_KEYS = (*AXES, "rank_offset")


@dataclass(frozen=True, kw_only=True)
class Component:
    """One module's layout.

    Attributes:
        name: "language", or a modality.
        tp, cp, dp, pp: sizes of tensor, context, data and pipeline parallelism.
        rank_offset: its first rank.

    Raises:
        ConfigError: a size below 1, a negative offset.
    """

    name: str
    tp: int = 1
    cp: int = 1
    dp: int = 1
    pp: int = 1
    rank_offset: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name == "rank_offset" else 1
            if field.name != "name" and (type(value) is not int or value < least):
                raise ConfigError(
                    f"component {self.name!r}: {field.name} is {value!r}; expected an integer of "
                    f"at least {least}"
                )

    @property
    def size(self) -> int:
        """Ranks that it has."""
        return self.tp * self.cp * self.dp * self.pp

    @property
    def ranks(self) -> range:
        """Its ranks."""
        return range(self.rank_offset, self.rank_offset + self.size)

    def __str__(self) -> str:
        sizes = [f"{axis}={getattr(self, axis)}" for axis in AXES if getattr(self, axis) > 1]
        return f"{self.name}={','.join(sizes) or 'tp=1'}"


def parse_component(text: str) -> Component:
    """A component from a flag's text, ``images=tp=1,dp=8``.

    Raises:
        ConfigError: it is not of this form.
    """
    name, separator, rest = text.partition("=")
    if not name or not separator or not rest:
        raise ConfigError(
            f"--component {text}: expected NAME=AXIS=SIZE,... such as images=tp=1,dp=8; axes are "
            f"{', '.join(_KEYS)}"
        )
    values: dict[str, int] = {}
    for item in rest.split(","):
        key, _, value = item.partition("=")
        if key not in _KEYS:
            near = get_close_matches(key, _KEYS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"--component {text}: {key!r} is none of {', '.join(_KEYS)}{hint}")
        if key in values:
            raise ConfigError(f"--component {text}: {key} is given twice; leave one away")
        if not value.removeprefix("-").isdecimal():
            raise ConfigError(f"--component {text}: {key} is {value!r}; expected an integer")
        values[key] = int(value)
    return Component(name=name, **values)


def check_components(
    components: Sequence[Component], *, world_size: int, modalities: Iterable[str] | None = None
) -> Mapping[str, Component]:
    """The components by name, the language model's last, once they fit the job and each other.

    Args:
        components: of all modules.
        world_size: processes of the job.
        modalities: those that the model has; None where they are not known yet.

    Raises:
        ConfigError: naming the components that do not fit, with what would.
        UnsupportedError: modules that share some of their ranks, encoders with context
            parallelism, or with stages on the language model's ranks.
    """
    by_name: dict[str, Component] = {}
    for component in components:
        if component.name in by_name:
            raise ConfigError(f"--component {component.name} is given twice; leave one away")
        by_name[component.name] = component
    if LANGUAGE not in by_name:
        raise ConfigError(
            f"--component is given for {sorted(by_name)} and not for {LANGUAGE!r}; add --component "
            f"{LANGUAGE}=tp=...,dp=..."
        )
    if modalities is not None:
        _check_names(by_name, list(modalities))
    language = by_name.pop(LANGUAGE)
    encoders = [*by_name.values()]
    for component in encoders:
        _check_modality(component, language)
    if any(component.ranks != language.ranks for component in encoders):
        _check_apart(encoders, language)
    held = {rank for component in (*encoders, language) for rank in component.ranks}
    if held != {*range(world_size)}:
        sizes = ", ".join(f"{one} on {_span(one)}" for one in (*encoders, language))
        raise ConfigError(
            f"--component: the components take the processes {_spans(held)} ({sizes}), and the job "
            f"has 0 to {world_size - 1}; start as many (torchrun --nproc-per-node) as they take "
            "without a gap, or change sizes and rank_offset"
        )
    return {**by_name, LANGUAGE: language}


def _check_names(by_name: Mapping[str, Component], modalities: list[str]) -> None:
    for name in by_name:
        if name not in (*modalities, LANGUAGE):
            near = get_close_matches(name, [*modalities, LANGUAGE], n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(
                f"--component {name}: the model has the modules {[*modalities, LANGUAGE]}{hint}"
            )
    missing = [name for name in modalities if name not in by_name]
    if missing:
        raise ConfigError(
            f"--component is given for {sorted(by_name)} and not for {missing}; every module needs "
            "one"
        )


def _check_modality(component: Component, language: Component) -> None:
    if component.cp != 1:
        raise UnsupportedError(
            f"--component {component}: encoders are parallel by tp, dp and pp; leave cp away"
        )
    if component.pp != 1 and component.ranks == language.ranks:
        raise UnsupportedError(
            f"--component {component} on the ranks of {LANGUAGE!r}: encoders there are parallel by "
            "tp and dp; leave pp away, or give them ranks of their own (rank_offset=)"
        )


def _check_apart(encoders: Sequence[Component], language: Component) -> None:
    """Encoders have ranks that the language model has not, and the same as others or none."""
    for component in encoders:
        shared = {*component.ranks} & {*language.ranks}
        if shared:
            raise UnsupportedError(
                f"--component: {_span(component)} of {component.name!r} and {_span(language)} of "
                f"{LANGUAGE!r} share {len(shared)}; give all modules the same ranks "
                f"({component.name}=tp=1,dp={language.size}), or encoders ranks that {LANGUAGE} "
                f"has not (rank_offset=)"
            )
        for other in encoders:
            shared = {*component.ranks} & {*other.ranks}
            if shared and component.ranks != other.ranks:
                raise UnsupportedError(
                    f"--component: {_span(component)} of {component.name!r} and {_span(other)} of "
                    f"{other.name!r} share {len(shared)}; give both the same ranks, or ranks of "
                    "their own (rank_offset=)"
                )


def _spans(ranks: Iterable[int]) -> str:
    """Ranks for a human: 0 to 3, 6 to 7."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    return ", ".join(f"{first} to {last}" for first, last in spans)


def _span(component: Component) -> str:
    return f"ranks {component.ranks.start} to {component.ranks.stop - 1}"
