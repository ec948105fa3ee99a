"""How a run ended, in words: one failure that names every rank."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass

from tests.rank_pool.messages import RankError, RankStatus, RankValue

_FRAME = re.compile(r'File "([^"]+)", line \d+ in (\S+)')
_THREAD = re.compile(r"^(?:Current thread|Thread) 0x", re.MULTILINE)
# Python's view of a collective: the function of torch.distributed that a user called.
_COLLECTIVE_FILE = re.compile(r"torch/distributed/(distributed_c10d|nn/functional)\.py$")
_DECORATORS = {"wrapper"}
_OUTPUT_LINES = 30
# A rank that dies is noticed a moment later than its peers notice the broken connection.
_DEATH_HEAD_START = 0.5


class RanksFailedError(AssertionError):
    """A run in which not every rank succeeded; the message tells each rank's part, first first."""


@dataclass(frozen=True, kw_only=True)
class RankExit:
    """How one rank of a script ended.

    Attributes:
        exit_code: as ``subprocess`` gives it: negative for a signal.
        stopped: "timeout", "peer" (terminated because another rank failed), or None.
        stacks: Python stacks, where the pool asked for them or the rank crashed.
    """

    exit_code: int
    stdout: str
    stderr: str
    stopped: str | None
    stacks: str


@dataclass(frozen=True, kw_only=True)
class Account:
    """Everything known about one rank of a function run."""

    rank: int
    status: RankStatus
    outcome: RankValue | RankError | None
    stacks: str
    stdout: str
    stderr: str


def values_or_failure(accounts: Sequence[Account], timeout: float) -> list[object]:
    """The functions' results by rank. Raises RanksFailedError unless every rank has one."""
    values = [a.outcome.value for a in accounts if isinstance(a.outcome, RankValue)]
    if len(values) == len(accounts):
        return values
    told = [_tell(account, timeout) for account in sorted(accounts, key=_order)]
    ranks = [a.rank for a in accounts if not isinstance(a.outcome, RankValue)]
    raise RanksFailedError(
        f"{len(ranks)} of {len(accounts)} ranks failed: {ranks}\n\n" + "\n\n".join(told)
    )


def describe_exit(code: int) -> str:
    """``-9`` -> "killed by SIGKILL"."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exited with code {code}"


def locate(stacks: str) -> str:
    """Where a rank is, from faulthandler's dump: the collective, or the innermost function."""
    threads = [_FRAME.findall(section) for section in _THREAD.split(stacks)]
    threads = [frames for frames in threads if frames]
    if not threads:
        return "at an unknown place (no stack came back)"
    for frames in reversed(threads):  # the main thread comes last
        for file, function in frames:
            if _COLLECTIVE_FILE.search(file) and function not in _DECORATORS:
                return f"in the collective {function}"
    return f"in {threads[-1][0][1]}"


def _order(account: Account) -> tuple[int, float]:
    if isinstance(account.outcome, RankError):
        return 0, account.outcome.when
    if account.outcome is None and account.status.stopped is None:
        return 0, account.status.ended - _DEATH_HEAD_START
    return (1 if account.outcome is None else 2), float(account.rank)


def _tell(account: Account, timeout: float) -> str:
    head, body = _headline(account, timeout)
    parts = [f"---- rank {account.rank}: {head}", body.rstrip()]
    if not isinstance(account.outcome, RankValue):
        for name, text in (("stdout", account.stdout), ("stderr", account.stderr)):
            if text.strip():
                tail = "\n".join(text.rstrip().splitlines()[-_OUTPUT_LINES:])
                parts.append(f"-- {name} of rank {account.rank}\n{tail}")
    return "\n".join(part for part in parts if part)


def _headline(account: Account, timeout: float) -> tuple[str, str]:
    status = account.status
    if isinstance(account.outcome, RankValue):
        return "returned", ""
    if isinstance(account.outcome, RankError):
        return account.outcome.traceback.rstrip().splitlines()[-1], account.outcome.traceback
    if status.stopped == "timeout":
        return f"still running after {timeout:g} s, {locate(account.stacks)}", account.stacks
    if status.stopped == "peer":
        return f"stopped after another rank failed, {locate(account.stacks)}", account.stacks
    assert status.exit_code is not None
    return f"{describe_exit(status.exit_code)} before it had a result", account.stacks


def exits_or_failure(exits: Sequence[RankExit], timeout: float) -> list[RankExit]:
    """The ranks' exits. Raises RanksFailedError when the script was killed at its time-out."""
    if not any(rank.stopped == "timeout" for rank in exits):
        return list(exits)
    told = []
    for number, rank in enumerate(exits):
        where = (
            f"still running after {timeout:g} s, {locate(rank.stacks)}\n{rank.stacks}"
            if rank.stopped == "timeout"
            else describe_exit(rank.exit_code)
        )
        tail = "\n".join(rank.stderr.rstrip().splitlines()[-_OUTPUT_LINES:])
        told.append(f"---- rank {number}: {where}\n-- stderr\n{tail}")
    raise RanksFailedError(f"the script did not end within {timeout:g} s\n\n" + "\n\n".join(told))
