"""What ranks say on the board, and what others read while they say it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from megatron.mimo.process.board import Board


def test_nobody_sees_a_slot_without_its_time(tmp_path: Path) -> None:
    """A witness that did would end a rank as one that has stood still since the machine began."""
    board, begin = Board(tmp_path), time.monotonic()
    writer = os.fork()
    if not writer:
        slot = board.take_slot(0)
        while True:
            slot.has("images")
            slot.enter("forward")
    try:
        while not board.slots():
            pass
        seen = []
        end = time.monotonic() + 0.4
        while time.monotonic() < end:
            (slot,) = board.slots().values()
            seen.append((slot.since >= begin, slot.phase in ("forward", "starting"), slot.part))
        assert set(seen) <= {(True, True, "images"), (True, True, "")}
        assert {seen[-1]} == {(True, True, "images")}
    finally:
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
