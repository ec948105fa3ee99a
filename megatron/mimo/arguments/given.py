"""The flags that the user gave, on the command line and in ``--config``, and their effect.

A flag of the user wins over a recipe's value for the same thing, even under another name. A flag
without effect is refused by name.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from megatron.core.models.mimo.errors import ConfigError
from megatron.mimo.arguments.without_effect import GROUPS, HARMLESS, NAMES
from megatron.mimo.recipes.recipe import Recipe

__all__ = ["check_effect", "given_by_user", "said_of", "settle_rivals"]

_DATA = ("data_path", "train_data_path", "valid_data_path", "test_data_path")
# the same in iterations and in samples
_UNITS = (
    ("lr_warmup_iters", "lr_warmup_samples"),
    ("lr_decay_iters", "lr_decay_samples"),
    ("lr_wsd_decay_iters", "lr_wsd_decay_samples"),
)
_TAKES_BACK = ("deprecated", "ignor", "no effect", "incompatible", "disabling", "overrid")
_NOTHING: Mapping[str, object] = {"lr_warmup_iters": 0, "lr_warmup_samples": 0}


def given_by_user(
    parser: argparse.ArgumentParser, words: Sequence[str], from_file: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments that stand on the command line or in the file, whatever their values.

    Args:
        parser: with all flags.
        words: the command line.
        from_file: as ``config_values`` returns it.
    """
    actions = [(action, action.default) for action in parser._actions]
    defaults = dict(parser._defaults)
    parser._defaults.clear()
    try:
        for action, _ in actions:
            action.default = argparse.SUPPRESS
        found, _ = parser.parse_known_args([word for word in words if word not in ("-h", "--help")])
    finally:
        parser._defaults.update(defaults)
        for action, default in actions:
            action.default = default
    return {**from_file, **vars(found)}


def check_effect(
    parser: argparse.ArgumentParser, recipe: Recipe, given: Mapping[str, Any]
) -> list[str]:
    """Refuse flags of Megatron that nothing here reads.

    Args:
        parser: with all flags.
        recipe: says which files it reads.
        given: as ``given_by_user`` returns it.

    Returns:
        A sentence for each flag that is read over, but asks for what is done anyway.

    Raises:
        ConfigError: names the flag, and what to give in its place.
    """
    told = []
    for group in parser._action_groups:
        for action in group._group_actions:
            name = action.dest
            if name not in given or not action.option_strings:
                continue
            flag = _flag(parser, name)
            why = NAMES.get(name) or GROUPS.get(group.title or "")
            if name in _DATA and name not in recipe.data_flags:
                reads = [_flag(parser, other) for other in _DATA if other in recipe.data_flags]
                has = f"it reads {', '.join(reads)}" if reads else "it makes its own data"
                why = f"recipe {recipe.name!r} does not read it: {has} (Recipe.data_flags)"
            if why is not None:
                raise ConfigError(f"{flag} has no effect: {why}; leave it away")
            if name in HARMLESS:
                told.append(f"{flag} is read over: {HARMLESS[name]}")
    return told


def said_of(given: Mapping[str, Any], parser: argparse.ArgumentParser, text: str) -> list[str]:
    """Lines in which Megatron says, while it checks arguments, that it overrides a user's flag.

    Flags that ``check_effect`` reports are left out.

    Args:
        given: as ``given_by_user`` returns it.
        parser: with all flags.
        text: what it printed and warned of, line by line.
    """
    flags = {
        word
        for action in parser._actions
        if action.dest in given and action.dest not in HARMLESS
        for word in (*action.option_strings, action.dest)
    }
    return [
        line.strip()
        for line in text.splitlines()
        if any(sign in line.lower() for sign in _TAKES_BACK)
        and flags & {word.strip(".,;:'\"()").partition("=")[0] for word in line.split()}
    ]


def settle_rivals(
    parser: argparse.ArgumentParser, recipe: Mapping[str, object], given: Mapping[str, Any]
) -> dict[str, object]:
    """A recipe's values without those whose rivals the user gives.

    A schedule in iterations becomes one in samples, or the reverse, where the user chooses the
    other unit for the run's length.

    Args:
        parser: with all flags.
        recipe: its values.
        given: as ``given_by_user`` returns it.

    Raises:
        ConfigError: the user gives two flags of which Megatron takes one.
    """
    values = dict(recipe)
    given = {name: value for name, value in given.items() if value is not None}

    def refuse_both(first: str, second: str, why: str) -> None:
        if first in given and second in given:
            flags = f"{_flag(parser, first)} and {_flag(parser, second)}"
            raise ConfigError(f"{flags} exclude each other: {why}; give one of them")

    refuse_both("train_iters", "train_samples", "both say how long to train")
    refuse_both(
        "global_batch_size", "step_batch_size_schedule", "both say how many samples a step takes"
    )
    for name in ("lr_warmup_iters", "lr_warmup_samples"):
        refuse_both("lr_warmup_fraction", name, "both say how long to warm up")
    was_in_samples = bool(values.get("train_samples"))
    in_samples = "train_samples" in given or (was_in_samples and "train_iters" not in given)
    for pair in _UNITS:
        right, wrong = (pair[1], pair[0]) if in_samples else pair
        if wrong in given:
            length = "train_samples" if in_samples else "train_iters"
            raise ConfigError(
                f"{_flag(parser, wrong)} does not go with {_flag(parser, length)}, which has "
                f"another unit; give {_flag(parser, right)}"
            )
    if in_samples != was_in_samples:
        _convert(values, given, to_samples=in_samples)
    if "lr_warmup_fraction" in given:
        values |= _NOTHING
    elif {"lr_warmup_iters", "lr_warmup_samples"} & given.keys():
        values["lr_warmup_fraction"] = None
    if "step_batch_size_schedule" in given:
        values["global_batch_size"] = None
    return values


def _convert(values: dict[str, object], given: Mapping[str, Any], *, to_samples: bool) -> None:
    batch = given.get("global_batch_size") or values.get("global_batch_size") or 1
    assert isinstance(batch, int)
    values["train_iters" if to_samples else "train_samples"] = None
    for iterations, samples in _UNITS:
        old, new = (iterations, samples) if to_samples else (samples, iterations)
        value = values.get(old)
        if value:
            assert isinstance(value, int)
            values[new] = value * batch if to_samples else -(-value // batch)
        if old in values:
            values[old] = _NOTHING.get(old)


def _flag(parser: argparse.ArgumentParser, name: str) -> str:
    """How a user writes an argument."""
    for action in parser._actions:
        if action.dest == name and action.option_strings:
            return action.option_strings[0]
    return name
