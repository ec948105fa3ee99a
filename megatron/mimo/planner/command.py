"""The command: reads a run's flags, and prints what the run would take."""

from __future__ import annotations

import argparse
import json
import os
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from megatron.core.models.mimo.errors import ConfigError, MimoError
from megatron.mimo.backend import Capabilities, capabilities
from megatron.mimo.backend.cards import Card, find_card, known_cards
from megatron.mimo.process.quiet import quiet_imports, stdout, warnings_shown

__all__ = ["main"]

_SHARE = 0.35
_EPILOG = """Takes the flags of a training run (examples/mimo/pretrain_mimo.py) beside these. No
weights, no data files and no other processes are needed. Memory is that of PyTorch's tensors; where
a card is named, room is left for what its driver, NCCL and the allocator hold beside them."""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the plan.

    Returns:
        0; 2 where the arguments are wrong; 1 where the run does not fit the card.
    """
    given, flags = _parser().parse_known_args(argv)
    try:
        card = _card(given.card)
        with _settled(given, flags, card) as planner:
            # once the backend is selected
            from megatron.mimo.planner.plans import make_plan

            plan = make_plan(planner, card=card, share=given.achieved_share)
    except MimoError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    # as above
    from megatron.mimo.planner.text import plan_text, plan_values

    text = json.dumps(plan_values(plan), indent=2) if given.json else plan_text(plan)
    sys.stdout.write(f"{text}\n")
    return 0 if plan.fits else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m megatron.mimo.plan",
        description="Parameters, memory, FLOPs and time of a run, before it starts.",
        epilog=_EPILOG,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--world-size", type=int, metavar="N", help="ranks of the job (default: the least that fit)"
    )
    parser.add_argument("--card", help="such as h100: whether it fits, and the time of a step")
    parser.add_argument(
        "--achieved-share",
        type=float,
        default=_SHARE,
        metavar="SHARE",
        help=f"of the card's dense bf16 rate that a step is assumed to reach (default: {_SHARE})",
    )
    parser.add_argument(
        "--samples",
        nargs="+",
        default=[],
        metavar="SHAPE",
        help="what samples hold, in turn: tokens of text, and images of a size in pixels, as in "
        "512+2*640x480 (default: the recipe's own data, or full rows with one medium)",
    )
    parser.add_argument("--json", action="store_true", help="one object, in bytes and FLOPs")
    return parser


def _card(name: str | None) -> Card | None:
    if name is None:
        return None
    found = find_card(name)
    if found is None:
        raise ConfigError(f"--card {name} is not in the table; it has {', '.join(known_cards())}")
    return found


@contextmanager
def _settled(given: Namespace, flags: list[str], card: Card | None) -> Iterator[Any]:
    """Settle what is planned, from flags and environment; afterwards the process is as before."""
    before = dict(os.environ)
    try:
        with quiet_imports(), stdout(shown=False), warnings_shown(shown=False):
            machine = capabilities()
            # once the backend is selected
            from megatron.mimo.layers import install_adam
            from megatron.mimo.planner.plans import Planner
            from megatron.mimo.planner.samples import parse_shape

            install_adam()
            shapes = [parse_shape(text) for text in given.samples]
            yield Planner(
                flags=flags,
                machine=_machine_of(card, machine),
                world_size=given.world_size,
                shapes=shapes,
                on_gpu=card is not None or machine.device != "cpu",
            )
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)


def _machine_of(card: Card | None, here: Capabilities) -> Capabilities:
    """The machine whose defaults and refusals count: that of the card, if one is named."""
    if card is None or here.device != "cpu":
        return here
    return replace(here, device="cuda", card=card.name)
