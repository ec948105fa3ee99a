from __future__ import annotations

import io

import pytest

from megatron.mimo.process.console import (
    Console,
    Pace,
    format_count,
    format_duration,
    format_progress,
)


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (59, "59 s"), (185, "3:05"), (7385, "2:03:05"), (-1, "0 s")]
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.00"),
        (7.312, "7.31"),
        (412.4, "412"),
        (999.7, "1.00k"),
        (19_840, "19.8k"),
        (1.2e6, "1.20M"),
    ],
)
def test_counts(value: float, text: str) -> None:
    assert format_count(value) == text


def test_the_progress_line() -> None:
    line = format_progress(
        iteration=25,
        total=1500,
        loss=0.81234,
        samples_per_second=415.2,
        figures=["19.9k tokens/s"],
        seconds_left=62,
        extra={"lr": "1.0e-03"},
    )
    assert line == (
        "iteration   25/1500  loss 0.8123  lr 1.0e-03  415 samples/s  19.9k tokens/s  ETA 1:02"
    )


def test_a_log_file_gets_plain_lines_at_milestones() -> None:
    stream = io.StringIO()
    console = Console(active=True, stream=stream)
    console.progress("one", milestone=False)
    console.progress("two", milestone=True)
    console.say("note")
    console.end_progress()
    assert stream.getvalue() == "two\nnote\n"


def test_a_terminal_gets_one_line_with_messages_above_it() -> None:
    stream = _Terminal()
    console = Console(active=True, stream=stream)
    console.progress("one", milestone=True)
    console.say("note")
    console.progress("two", milestone=True)
    console.end_progress()
    assert stream.getvalue() == "\r\x1b[Kone\r\x1b[Knote\none\r\x1b[Ktwo\n"


def test_other_ranks_are_silent() -> None:
    stream = io.StringIO()
    console = Console(active=False, stream=stream)
    console.progress("one", milestone=True)
    console.say("note")
    assert stream.getvalue() == ""


def test_pauses_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("megatron.mimo.process.console.time.monotonic", lambda: now[0])
    pace = Pace()
    now[0] += 5  # set-up
    pace.start()
    now[0] += 2
    pace.step(8)
    now[0] += 1
    pace.pause()
    now[0] += 30  # evaluation
    pace.resume()
    now[0] += 1
    pace.step(8)
    assert pace.seconds == 4
    assert pace.samples == 16
    assert pace.samples_per_second == 4
    assert pace.seconds_per_iteration == 2
