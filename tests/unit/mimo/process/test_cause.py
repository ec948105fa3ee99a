"""Which of the failures of a job is its cause, and what is said of it."""

from __future__ import annotations

import signal

from megatron.mimo.process.board import SlotContent, Word
from megatron.mimo.process.cause import Cause, Ending, cause_of, describe_exit
from megatron.mimo.process.identity import Process

LAUNCHER = Process(pid=7, started="1")


def word(kind: str, when: float, rank: int = 0, text: str = "") -> Word:
    return Word(kind=kind, text=text or f"{kind} {rank}", when=when, rank=rank, printed=False)


def ending(rank: int, when: float, status: int | None, *, done: bool = False) -> Ending:
    return Ending(rank=rank, pid=rank, when=when, done=done, status=status, text=f"ended {rank}")


def cause(
    words: list[Word], endings: list[Ending], *, launcher_ended: float | None = None
) -> Cause | None:
    return cause_of(words, endings, launcher_ended=launcher_ended, launcher=LAUNCHER)


def test_the_first_that_failed_by_itself_is_the_cause() -> None:
    found = cause(
        [word("lost", 1.0, 0), word("failed", 2.0, 1), word("failed", 3.0, 2)],
        [ending(0, 1.5, 256), ending(1, 2.5, 256), ending(2, 3.5, 256)],
    )
    assert found == Cause(text="failed 1", printed=False)


def test_a_rank_that_was_killed_comes_before_those_that_lost_it() -> None:
    found = cause(
        [word("lost", 1.1, 0)],
        [ending(1, 1.2, signal.SIGKILL), ending(0, 1.3, 256)],
    )
    assert found is not None
    assert found.text == "ended 1"


def test_a_rank_that_a_launcher_ended_comes_behind_the_one_that_was_killed() -> None:
    """Both are seen to have ended at one look, or the one that was asked to end a little before."""
    for when in (1.0, 1.1):
        found = cause([], [ending(0, 1.0, signal.SIGTERM), ending(1, when, signal.SIGKILL)])
        assert found is not None
        assert found.text == "ended 1"
    found = cause([], [ending(0, 1.0, signal.SIGTERM), ending(1, 9.0, signal.SIGKILL)])
    assert found is not None
    assert found.text == "ended 0"


def test_who_lost_a_connection_is_named_where_nobody_else_failed() -> None:
    found = cause([word("lost", 1.0, 0, "Connection reset")], [ending(0, 1.1, 256)])
    assert found is not None
    assert found.text == "Connection reset"


def test_ranks_that_end_well_leave_nothing_to_say() -> None:
    assert cause([], [ending(0, 1.0, 0, done=True), ending(1, 1.0, None, done=True)]) is None
    crashed = cause([], [ending(0, 1.0, signal.SIGSEGV, done=True)])
    assert crashed is not None, "it had said so, and then crashed"


def test_a_launcher_that_is_killed_is_the_cause_of_its_ranks_ends() -> None:
    killed = [ending(0, 5.0, signal.SIGKILL), ending(1, 5.0, None)]
    found = cause([], killed, launcher_ended=5.0)
    assert found is not None
    assert found.text.startswith("error: the launcher (process 7) has ended without a word")
    later = cause([], killed, launcher_ended=5.5)  # it ended for its rank did
    assert later is not None
    assert later.text == "ended 0"


def test_an_exit_is_described_by_rank_host_place_and_signal() -> None:
    slot = SlotContent(
        process=Process(pid=12, started="1"),
        rank=3,
        iteration=40,
        phase="forward",
        since=0.0,
        count=1,
        done=False,
    )
    assert describe_exit(slot, signal.SIGSEGV, "", host="n1") == (
        "error: rank 3 on n1 (process 12) was ended by SIGSEGV in iteration 40, forward"
    )
    stacks = (
        "Fatal Python error: Segmentation fault\n\n"
        "Current thread 0x00007f (most recent call first):\n"
        '  File "/usr/lib/python3.12/site-packages/torch/x.py", line 5 in call\n'
        '  File "/home/me/my/data.py", line 63 in read\n'
    )
    assert describe_exit(slot, signal.SIGSEGV, stacks, host="n1").endswith(
        "in iteration 40, forward, at me/my/data.py:63 in read"
    )
    assert "ended with exit code 3 and without a word" in describe_exit(slot, 3 << 8, "", host="")
    assert "where memory ends" in describe_exit(slot, signal.SIGKILL, "", host="")
