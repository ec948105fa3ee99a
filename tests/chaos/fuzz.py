"""Runs malformed inputs in a process of their own: no hang, no unnamed error, no flood of memory.

Case number i of a kind follows from the seed and i alone, so that a failure can be shown again.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from random import Random

from benchmarks.peak_memory import peak_bytes, reset_peak
from megatron.core.models.mimo.errors import MimoError
from tests.chaos.tally import Tally

__all__ = ["Case", "Kind", "run_cases"]

Case = Callable[[Random], None]  # builds an input, gives it to the code, and returns or raises
Kind = Callable[[], contextlib.AbstractContextManager[Case]]  # is entered once in each process

MEMORY = 1 << 30  # bytes by which one process may grow
CASE_SECONDS = 20  # until a case counts as a hang
_FORK = multiprocessing.get_context("fork")


class _HangError(BaseException):
    """A case took too long; no handler of errors catches it."""


def run_cases(
    name: str, kind: Kind, *, seed: int, seconds: float, at_most: int | None = None, first: int = 0
) -> Tally:
    """Try cases until the time is over or there were so many.

    Args:
        name: of the kind.
        kind: makes the function that tries one.
        seed: of the campaign.
        seconds: for all cases together.
        at_most: cases.
        first: number of the first one.
    """
    tally = Tally(kind=name)
    begin = time.monotonic()
    number = first
    while time.monotonic() - begin < seconds and (at_most is None or number - first < at_most):
        mine, theirs = _FORK.Pipe(duplex=False)
        left = seconds - (time.monotonic() - begin)
        count = None if at_most is None else at_most - (number - first)
        process = _FORK.Process(
            target=_work, args=(theirs, name, kind, seed, number, left, count), daemon=True
        )
        process.start()
        theirs.close()
        number = _listen(mine, process, tally, f"{name} --seed {seed} --case", number)
        mine.close()
        process.kill()
        process.join()
    tally.seconds = time.monotonic() - begin
    return tally


def _listen(
    pipe: Connection,
    process: multiprocessing.process.BaseProcess,
    tally: Tally,
    label: str,
    number: int,
) -> int:
    """Count what a process says of its cases; the number of the next one to try."""
    while True:
        if not pipe.poll(3 * CASE_SECONDS + 60):
            tally.fail(f"{label} {number}: it hangs, and no signal helps")
            return number + 1
        try:
            message = pipe.recv()
        except EOFError:
            process.join()
            tally.fail(f"{label} {number}: the process ended with {process.exitcode}")
            return number + 1
        if message is None:
            return number
        outcome, text, grown = message
        tally.peak = max(tally.peak, grown)
        if grown > MEMORY:
            outcome, text = "failed", f"{grown / 2**20:.0f} MiB were taken; {text}"
        if outcome == "failed":
            tally.fail(f"{label} {number}: {text}")
        else:
            tally.outcomes[outcome] += 1
        number += 1
        if grown > MEMORY:  # the next process starts small
            return number


def _work(
    pipe: Connection,
    name: str,
    kind: Kind,
    seed: int,
    number: int,
    seconds: float,
    count: int | None,
) -> None:
    signal.signal(signal.SIGALRM, _hang)
    end, first = time.monotonic() + seconds, number
    with kind() as case:
        start = reset_peak()
        while time.monotonic() < end and (count is None or number - first < count):
            outcome, text = _try(case, Random(f"{seed}/{name}/{number}"))
            pipe.send((outcome, text, peak_bytes() - start))
            number += 1
    pipe.send(None)


def _try(case: Case, random: Random) -> tuple[str, str]:
    signal.setitimer(signal.ITIMER_REAL, CASE_SECONDS)
    try:
        case(random)
    except MimoError as error:
        text = str(error)
        if not text.strip() or len(text) > 4000:
            return "failed", f"an error of {len(text)} characters: {text[:200]!r}"
        return "refused by name", ""
    except _HangError:
        return "failed", "it hangs:\n" + traceback.format_exc()[-1500:]
    except BaseException:  # noqa: BLE001 - any other is what is looked for
        return "failed", traceback.format_exc()[-1500:]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return "taken", ""


def _hang(*_: object) -> None:
    raise _HangError


def alternatives(random: Random) -> Iterator[object]:
    """Values that a careless writer of JSON leaves where another was meant, endlessly."""
    values: list[Callable[[], object]] = [
        lambda: None,
        lambda: random.choice([True, False]),
        lambda: random.choice([0, -1, 1, 2**31, 2**63, -(2**70), 10**400]),
        lambda: random.choice([0.5, -1.5, 1e308, float("nan"), float("inf")]),
        lambda: random.choice(["", " ", "\x00", "../../etc/passwd", "<image>" * 40, "ä" * 300]),
        lambda: random.choice(["\ud800", "data:image/png;base64,AAAA", "http://x/y.png", "."]),
        list,
        dict,
        lambda: [[[[]]]],
        lambda: [None, 1, "x", {}],
        lambda: {"type": "image"},
        lambda: {"": {"": ""}},
        lambda: "x" * random.randrange(10_000),
    ]
    while True:
        yield random.choice(values)()


def disturb(value: object, random: Random) -> object:
    """A copy of a JSON value with one thing wrong somewhere in it."""
    if isinstance(value, dict) and value and random.random() < 0.9:
        key = random.choice(list(value))
        what = random.random()
        if what < 0.15:
            return {name: part for name, part in value.items() if name != key}
        if what < 0.3:
            new = random.choice([key.upper(), f"{key}s", "", "image", "system", "weight"])
            return {(new if name == key else name): part for name, part in value.items()}
        return {**value, key: disturb(value[key], random)}
    if isinstance(value, list) and value and random.random() < 0.9:
        place = random.randrange(len(value))
        what = random.random()
        if what < 0.1:
            return value[:place] + value[place + 1 :]
        if what < 0.2:
            return value[:place] + [value[place]] * random.choice([2, 50]) + value[place:]
        if what < 0.3:
            return [value[place], *value]
        return [*value[:place], disturb(value[place], random), *value[place + 1 :]]
    return next(alternatives(random))


def scramble(data: bytes, random: Random) -> bytes:
    """A copy of bytes that was cut off, hit or mixed up."""
    data = bytes(data)
    for _ in range(random.choice([1, 1, 2, 5])):
        place = random.randrange(len(data) + 1)
        what = random.random()
        if what < 0.2:
            data = data[:place]
        elif what < 0.5 and data:
            hit = bytearray(data)
            for _ in range(random.choice([1, 1, 4, 64])):
                hit[random.randrange(len(hit))] = random.randrange(256)
            data = bytes(hit)
        elif what < 0.7:
            size = random.choice([1, 4, 16])
            new = random.choice([b"\0", b"\xff", b"\x7f"]) * size
            data = data[:place] + new + data[place + size :]
        elif what < 0.85:
            data = data[:place] + random.randbytes(random.choice([1, 7, 300])) + data[place:]
        else:
            data = data[place:]
    return data
