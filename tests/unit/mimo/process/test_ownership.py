"""One job at a time writes to a folder."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from megatron.core.models.mimo.errors import ConfigError
from megatron.mimo.process import ownership
from megatron.mimo.process.ownership import FILE, Ownership, own
from tests.time_limits import SOON

pytestmark = pytest.mark.slow  # waits

FORK = multiprocessing.get_context("fork")


def silent(_: str) -> None:
    pass


def _own_and_report(folder: Path, answer: Connection, seconds: float) -> None:
    try:
        own(folder, tell=silent)
        answer.send("owns")
        time.sleep(seconds)
    except ConfigError as error:
        answer.send(str(error))


def owner_elsewhere(folder: Path, *, seconds_ago: float) -> None:
    """Let the folder belong to a process of another host."""
    mine = own(folder, tell=silent)
    assert mine is not None
    content = json.loads((folder / FILE).read_text()) | {"machine": "far", "host": "far-away"}
    (folder / FILE).write_text(json.dumps(content))
    then = time.time() - seconds_ago
    os.utime(folder / FILE, (then, then))


def test_a_folder_has_one_owner_and_then_the_next(tmp_path: Path) -> None:
    mine = own(tmp_path / "new", tell=silent)
    assert mine is not None
    assert mine.holds()
    with pytest.raises(ConfigError) as refused:
        own(tmp_path / "new", tell=silent)
    assert f"belongs to a run that is going on: process {os.getpid()} on " in str(refused.value)
    assert "give another --output" in str(refused.value)
    mine.release()
    assert not list((tmp_path / "new").iterdir())
    assert own(tmp_path / "new", tell=silent) is not None


def test_the_folder_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    mine, theirs = FORK.Pipe()
    process = FORK.Process(target=_own_and_report, args=(tmp_path, theirs, 10 * SOON))
    process.start()
    assert mine.recv() == "owns"
    with pytest.raises(ConfigError, match=f"process {process.pid} on "):
        own(tmp_path, tell=silent)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGSTOP)  # it may go on at any time
    with pytest.raises(ConfigError, match=f"process {process.pid} on "):
        own(tmp_path, tell=silent)
    process.kill()
    process.join()
    assert own(tmp_path, tell=silent) is not None


def test_a_number_that_another_process_got_is_not_its_owner(tmp_path: Path) -> None:
    own(tmp_path, tell=silent)
    content = json.loads((tmp_path / FILE).read_text())
    assert content["started"], "this system tells when a process started"
    (tmp_path / FILE).write_text(json.dumps(content | {"started": "1"}))
    assert own(tmp_path, tell=silent) is not None


def test_one_of_many_that_want_a_dead_owners_folder_gets_it(tmp_path: Path) -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    own(tmp_path, tell=silent)
    content = json.loads((tmp_path / FILE).read_text()) | {"pid": process.pid, "started": "1"}
    (tmp_path / FILE).write_text(json.dumps(content))
    pipes = [FORK.Pipe() for _ in range(8)]
    processes = [
        FORK.Process(target=_own_and_report, args=(tmp_path, theirs, 10 * SOON))
        for _, theirs in pipes
    ]
    for process in processes:
        process.start()
    answers = [mine.recv() for mine, _ in pipes]
    for process in processes:
        process.kill()
        process.join()
    assert answers.count("owns") == 1, answers
    assert sum("belongs to a run that is going on" in answer for answer in answers) == 7
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_an_owner_on_another_host_lives_as_long_as_it_touches_the_file(tmp_path: Path) -> None:
    owner_elsewhere(tmp_path, seconds_ago=100)
    assert own(tmp_path, tell=silent) is not None
    owner_elsewhere(tmp_path / "other", seconds_ago=0)
    said: list[str] = []

    def touch(text: str) -> None:
        said.append(text)
        os.utime(tmp_path / "other" / FILE, (time.time() + 1, time.time() + 1))

    with pytest.raises(ConfigError, match="on far-away since"):
        own(tmp_path / "other", tell=touch)
    assert "last heard of" in said[0]
    (tmp_path / "third").mkdir()
    owner_elsewhere(tmp_path / "third", seconds_ago=0)
    assert own(tmp_path / "third", tell=silent, stale=1.0) is not None


def test_who_has_lost_a_folder_hears_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "BEAT", 0.0)
    mine = own(tmp_path, tell=silent)
    assert mine is not None
    lost: list[bool] = []
    os.utime(tmp_path / FILE, (1, 1))
    mine.beat(lambda: lost.append(True))
    assert not lost
    assert (tmp_path / FILE).stat().st_mtime > 1
    owner_file = tmp_path / FILE
    owner_file.unlink()
    other = own(tmp_path, tell=silent)
    mine.beat(lambda: lost.append(True))
    assert lost == [True]
    mine.release()  # which is not its own any more
    assert isinstance(other, Ownership)
    assert other.holds()


def test_a_folder_that_is_released_is_never_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "BEAT", 0.0)
    mine = own(tmp_path, tell=silent)
    assert mine is not None
    mine.release()
    assert not (tmp_path / FILE).exists()
    other = own(tmp_path, tell=silent)
    lost: list[bool] = []
    mine.beat(lambda: lost.append(True))  # by a thread that has not been told yet
    assert not lost
    assert other is not None
    assert other.holds()


def test_a_file_that_was_removed_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "BEAT", 0.0)
    mine = own(tmp_path, tell=silent)
    assert mine is not None
    written = (tmp_path / FILE).read_text()
    (tmp_path / FILE).unlink()
    lost: list[bool] = []
    mine.beat(lambda: lost.append(True))
    assert not lost
    assert (tmp_path / FILE).read_text() == written
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_a_file_as_output_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(ConfigError, match="is not a folder; expected one"):
            own(folder, tell=silent)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_pipe_in_the_place_of_the_file_is_refused_and_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / FILE)
    with pytest.raises(ConfigError, match=r"\.owner is no regular file; remove it"):
        own(tmp_path, tell=silent)
