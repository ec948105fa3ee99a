"""Notices ranks that stand still within half a minute, and ends them if it lasts."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass

from megatron.mimo.process.board import Board, SlotContent, Word
from megatron.mimo.process.cause import Ending
from megatron.mimo.process.identity import host_name, state, usage
from megatron.mimo.process.stacks import STACKS, Frame, frames_of, innermost, is_collective

__all__ = ["StallWatch"]

_STILL = 20.0  # seconds without a sign of life until a warning
_BUSY = 300.0  # seconds of work in one phase of a step until a warning
_OF_STEPS = ("reading data", "forward", "backward")  # phases that are begun many times
_ALIVE_SECONDS, _ALIVE_BYTES = 0.05, 1 << 16  # of CPU and of files, in a second: a sign of life
_ANSWER = 1.0  # seconds in which a rank that is asked for its stacks writes them
_END = 0.5  # seconds in which a rank that was stopped writes them before it is killed


@dataclass(kw_only=True)
class _Seen:
    """The state of a rank when it was last looked at."""

    count: int
    alive: float  # when it last gave a sign of life
    used: tuple[float, int]
    looked: float
    warned: float = 0.0  # seconds of standing still that were told


class StallWatch:
    """Looks at the ranks of a host again and again; time is the machine's monotonic clock.

    A sign of life is a new phase, CPU time or bytes read and written. A rank that waits for others
    in a collective, as its stacks tell, is not to blame.
    """

    def __init__(self, board: Board, timeout: float, *, others: bool) -> None:
        self.ended: list[Ending] = []
        self._board = board
        self._timeout = timeout
        self._others = others  # whether there are ranks on other hosts
        self._seen: dict[int, _Seen] = {}

    def look(self, slots: Mapping[int, SlotContent]) -> list[str]:
        """Look at the ranks that live; returns warnings, and ends what stood still for too long."""
        now = time.monotonic()
        for rank, slot in slots.items():
            self._update(rank, slot, now)
        lasting = {rank: self._lasts(rank, slot, now) for rank, slot in slots.items()}
        due = [rank for rank, seconds in lasting.items() if self._is_due(rank, seconds)]
        if not due:
            return []
        limit = min(_STILL, self._timeout or _STILL) / 2
        still = {rank for rank, seconds in lasting.items() if seconds >= limit}
        frames = self._ask({rank: slots[rank] for rank in still})
        culprits = {rank for rank in still if not is_collective(frames[rank])}
        if not culprits and still == set(slots) and (not self._others or _all_long(lasting)):
            culprits = still  # all wait for one another
        lines = []
        for rank in due:
            self._seen[rank].warned = lasting[rank]
            if rank in culprits:
                text = self._describe(slots[rank], lasting[rank], frames[rank])
                if self._timeout and lasting[rank] >= self._timeout:
                    lines += self._end(slots[rank], text)
                else:
                    then = f"; it is ended after {self._timeout:g} s (--stall-timeout)"
                    lines.append(f"warning: {text}{then if self._timeout else ''}")
        return lines

    def _update(self, rank: int, slot: SlotContent, now: float) -> None:
        used = usage(slot.process.pid) or (0.0, 0)
        seen = self._seen.get(rank)
        if seen is None or seen.count != slot.count:
            self._seen[rank] = _Seen(count=slot.count, alive=slot.since, used=used, looked=now)
            return
        if now - seen.looked < 1.0:
            return
        seconds, moved = (new - old for new, old in zip(used, seen.used, strict=True))
        lively = seconds >= _ALIVE_SECONDS * (now - seen.looked) or moved >= _ALIVE_BYTES
        if lively or state(slot.process.pid) == "R":
            seen.alive = now
        seen.used, seen.looked = used, now

    def _lasts(self, rank: int, slot: SlotContent, now: float) -> float:
        """For how long a rank has stood still, or been in one phase of a step for far too long."""
        still = now - self._seen[rank].alive
        phase = now - slot.since
        if slot.phase in _OF_STEPS and phase >= _BUSY:
            return phase
        return still

    def _is_due(self, rank: int, seconds: float) -> bool:
        """Whether to look closer: at first, whenever the time has doubled, and at the end."""
        warned, end = self._seen[rank].warned, self._timeout
        more = seconds >= _STILL and seconds >= 2 * warned
        return more or (0 < end <= seconds and warned < end)

    def _ask(self, slots: Mapping[int, SlotContent]) -> dict[int, list[Frame]]:
        """The frames of ranks; none of one that does not answer."""
        before = {rank: self._written(rank) for rank in slots}
        for slot in slots.values():
            with contextlib.suppress(OSError):
                os.kill(slot.process.pid, STACKS)
        end = time.monotonic() + _ANSWER
        while time.monotonic() < end:
            time.sleep(0.05)
            if all(
                self._written(rank) > before[rank] or state(slot.process.pid) == "T"
                for rank, slot in slots.items()
            ):
                break
        time.sleep(0.05)
        return {rank: frames_of(self._text(rank, before[rank])) for rank in slots}

    def _describe(self, slot: SlotContent, seconds: float, frames: list[Frame]) -> str:
        letter = state(slot.process.pid)
        at = slot.where()
        frame = innermost(frames)
        if letter == "T":
            at += ", stopped by a signal (kill -CONT lets it go on)"
        elif is_collective(frames):
            at += ", waiting for other ranks"
        elif letter == "D":
            at += ", waiting for a disk or another device"
        if frame is not None:
            at += f", at {frame}"
        return (
            f"rank {slot.rank} on {host_name()} (process {slot.process.pid}) has stood still for "
            f"{seconds:.0f} s in {at}"
        )

    def _end(self, slot: SlotContent, text: str) -> list[str]:
        """End a rank; its stacks, to print."""
        before = self._written(slot.rank)
        for number in (STACKS, signal.SIGCONT):  # in this order: one that is stopped writes first
            with contextlib.suppress(OSError):
                os.kill(slot.process.pid, number)
        time.sleep(_END)
        stacks = self._text(slot.rank, before)
        ending = Ending(
            rank=slot.rank,
            pid=slot.process.pid,
            when=time.monotonic(),
            done=False,
            status=None,
            text=f"error: {text}, and was ended (--stall-timeout {self._timeout:g})",
        )
        self.ended.append(ending)
        word = Word(
            kind="failed", text=ending.text, when=ending.when, rank=slot.rank, printed=False
        )
        self._board.say(word)
        with contextlib.suppress(OSError):
            os.kill(slot.process.pid, signal.SIGKILL)
        return [f"stacks of rank {slot.rank}, which stood still:\n{stacks.rstrip()}"]

    def _written(self, rank: int) -> int:
        path = self._board.traceback_file(rank)
        return path.stat().st_size if path.exists() else 0

    def _text(self, rank: int, start: int) -> str:
        path = self._board.traceback_file(rank)
        if not path.exists():
            return ""
        return path.read_bytes()[start:].decode(errors="replace")


def _all_long(lasting: Mapping[int, float]) -> bool:
    return all(seconds >= 3 * _STILL for seconds in lasting.values())
