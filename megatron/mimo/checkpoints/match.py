"""Which weights of a Hugging Face model belong to which row, and whether all are there."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.models.common.keys import KeyTable

__all__ = ["Match", "check_shapes", "check_spellings", "match_names"]

_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Match:
    """Names of a model's weights, sorted by what becomes of them.

    Attributes:
        given: canonical name -> name as the files have it, of every weight that a row uses.
        carried: names as the files have them, of weights that our model does without.
        copies: name as the files have it -> canonical name of the weight it is tied to.
    """

    given: Mapping[str, str]
    carried: tuple[str, ...]
    copies: Mapping[str, str]


def match_names(names: Collection[str], table: KeyTable, *, source: str) -> Match:
    """Sort the names of a model's weights.

    Args:
        names: of all of them, in any known spelling.
        table: of the model's family.
        source: where they are from, for errors.

    Raises:
        InputError: weights are missing, unexpected or given in two spellings.
    """
    wanted = {name for row in table.each() for name in row.hf}
    tied = dict(table.tied)
    given: dict[str, str] = {}
    copies: dict[str, str] = {}
    carried: list[str] = []
    unexpected: list[str] = []
    for name in names:
        canonical = table.canonical(name)
        if canonical in wanted:
            if canonical in given:
                raise InputError(
                    f"{source} has one weight under two names, {given[canonical]!r} and {name!r}; "
                    "remove either"
                )
            given[canonical] = name
        elif canonical in tied:
            copies[name] = tied[canonical]
        elif table.is_carried(canonical):
            carried.append(name)
        else:
            unexpected.append(name)
    for name, origin in list(copies.items()):
        if origin not in given:  # the file holds the tied weight under its other name only
            given[origin] = name
            del copies[name]
    missing = [name for row in table.each() for name in row.hf if name not in given]
    if missing or unexpected:
        raise InputError(_complaint(source, missing, unexpected))
    return Match(given=given, carried=tuple(carried), copies=copies)


def check_spellings(shapes: Mapping[str, Sequence[int]], table: KeyTable) -> None:
    """Refuse a table that does not know how the module tree of transformers names parameters.

    Args:
        shapes: of parameters in that tree, by name; what ``save_pretrained`` writes may differ from
            it.
        table: of the model's family.

    Raises:
        InputError: some are in no entry, under no known spelling.
    """
    entries = table.fitting(shapes).each()
    known = {name.partition("[")[0] for row in entries for name in row.hf}
    known |= {name for name, _ in table.tied}
    unknown = [
        name
        for name in shapes
        if (canonical := table.canonical(name)) not in known and not table.is_carried(canonical)
    ]
    if unknown:
        raise InputError(
            f"{len(unknown)} parameters of the module tree of transformers are in no entry of the "
            f"family's key table: {_some(unknown)}; add the prefixes by which it calls them to "
            "the aliases of its KeyTable, or add rows"
        )


def check_shapes(
    expected: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]], *, source: str
) -> None:
    """Compare the shapes of weights with those that the configuration asks for.

    Args:
        expected: canonical name -> shape.
        shapes: the same of the weights.
        source: where they are from, for errors.

    Raises:
        InputError: some differ.
    """
    wrong = [
        f"{name} is {list(shapes[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if tuple(shapes[name]) != tuple(shape)
    ]
    if wrong:
        raise InputError(
            f"{source}: {len(wrong)} weights do not have the shape that config.json describes: "
            f"{_some(wrong, '; ')}; the weights and config.json are not of one model"
        )


def _complaint(source: str, missing: list[str], unexpected: list[str]) -> str:
    parts = []
    if missing:
        parts.append(f"{len(missing)} weights are missing: {_some(missing)}")
    if unexpected:
        parts.append(f"{len(unexpected)} are not known: {_some(unexpected)}")
    hint = ""
    if missing and unexpected:
        near = difflib.get_close_matches(unexpected[0], missing, n=1)
        hint = f" (is {unexpected[0]!r} meant to be {near[0]!r}?)" if near else ""
    return (
        f"{source}: {'; '.join(parts)}{hint}. The weights are not those of the architecture in "
        "config.json, or some files are missing"
    )


def _some(words: list[str], separator: str = ", ") -> str:
    more = f"{separator}and {len(words) - _SHOWN} more" if len(words) > _SHOWN else ""
    return separator.join(words[:_SHOWN]) + more
