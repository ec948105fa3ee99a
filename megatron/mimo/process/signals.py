"""SIGTERM and Ctrl-C: save and leave while training, leave at once afterwards."""

from __future__ import annotations

import os
import signal
import time
from argparse import Namespace
from types import FrameType

from megatron.mimo.process import presence
from megatron.mimo.process.console import Console

__all__ = ["leave_on_signal", "save_on_signal"]

_SECOND_INTERRUPT = 2.0  # seconds; a launcher repeats the terminal's Ctrl-C at once


def save_on_signal(args: Namespace, console: Console) -> list[str]:
    """Let Ctrl-C do what SIGTERM does: save and exit after the current iteration.

    Returns:
        A list that gets the name of the signal which stopped the run.
    """
    received: list[str] = []
    if not args.exit_signal_handler:
        return received
    megatron_handler = signal.getsignal(args.exit_signal)
    first = [0.0]

    def handle(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        now = time.monotonic()
        if not received:
            received.append(name)
            first[0] = now
            console.say(f"{name}: saving a checkpoint and leaving ...")
        elif number == signal.SIGINT and now - first[0] > _SECOND_INTERRUPT:
            presence.here().say("stopped", f"{name}, twice", printed=True)
            os._exit(130)
        if callable(megatron_handler):
            megatron_handler(number, frame)

    signal.signal(args.exit_signal, handle)
    signal.signal(signal.SIGINT, handle)
    return received


def leave_on_signal(args: Namespace, console: Console) -> None:
    """From here on a signal ends the process at once: all that took long is on disk."""

    def handle(number: int, _: FrameType | None) -> None:
        console.say(
            f"{signal.Signals(number).name}: training is complete and saved; the same command "
            "evaluates it"
        )
        presence.here().slot.done()
        os._exit(0)

    signal.signal(args.exit_signal, handle)
    signal.signal(signal.SIGINT, handle)
