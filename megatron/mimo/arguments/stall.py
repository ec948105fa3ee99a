"""``--stall-timeout``: for how long a rank may stand still."""

from __future__ import annotations

import argparse
import math

__all__ = ["STALL_TIMEOUT", "seconds"]

STALL_TIMEOUT = 1800.0  # saves to slow disks and first compilations take less


def seconds(text: object) -> float:
    """A number of seconds from 0, which is never, on."""
    try:
        value = float(str(text))
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected seconds, such as {STALL_TIMEOUT:g}, or 0 for never"
        )
    return value
