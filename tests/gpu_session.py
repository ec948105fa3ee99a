"""Tests that need a GPU, in an interpreter of their own.

A process is on the CPU or on a GPU, for good: the CPU backend answers for CUDA in all of
megatron-core, and refuses a process that has used a GPU. So a test session hides the GPUs from
itself and from all that it starts, and runs what needs one last, in a second pytest (``--gpu``)
that sees them. The second one's reports are taken over as they come.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import pytest

_VISIBLE = "CUDA_VISIBLE_DEVICES"
_SILENCE_SECONDS = 600.0
_DEVICE_FILES = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
_OUTPUT_LINES = 40


def needs_gpu(item: pytest.Item) -> bool:
    """Whether a test is for the session that sees the GPUs."""
    return any(item.get_closest_marker(name) for name in ("gpu", "te"))


def has_driver() -> bool:
    """Whether there may be a GPU, without asking torch, whose answer would bind this process."""
    return any(map(os.path.exists, _DEVICE_FILES)) or shutil.which("nvidia-smi") is not None


def has_gpu() -> bool:
    """Whether torch can use one; only a process that sees them may ask."""
    import torch

    return torch.cuda.is_available()


def mark_skips(items: Sequence[pytest.Item], *, gpu: bool) -> None:
    """Marks what cannot run with the reason, ``gpu`` being whether there is one."""
    has_te = importlib.util.find_spec("transformer_engine") is not None
    for item in items:
        if needs_gpu(item) and not gpu:  # Transformer Engine counts as absent on the CPU
            item.add_marker(pytest.mark.skip(reason="needs a GPU: torch sees no CUDA device"))
        if item.get_closest_marker("te") and not has_te:
            item.add_marker(pytest.mark.skip(reason="needs Transformer Engine: not installed"))


class GpuSession:
    """The second pytest, seen from the first, whose ``config`` it takes.

    It is started by the first test that needs it, with all that are left, and again where a test
    has ended it.
    """

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._visible = os.environ.get(_VISIBLE)
        self._process: subprocess.Popen[bytes] | None = None
        self._reports: Connection | None = None
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 -- lives as long as this
        os.environ[_VISIBLE] = ""

    def reports(self, item: pytest.Item, left: Sequence[pytest.Item]) -> Iterator[Any]:
        """Runs one test; its reports of set-up, call and tear-down.

        Args:
            item: the test.
            left: it and those that come after it.
        """
        if self._process is None:
            self._start([one.nodeid for one in left])
        assert self._reports is not None
        try:
            while self._reports.poll(_SILENCE_SECONDS):
                message = self._reports.recv()
                if message == {"finished": item.nodeid}:
                    return
                yield self._config.hook.pytest_report_from_serializable(
                    config=self._config, data=message
                )
            why = f"said nothing for {_SILENCE_SECONDS:g} s"
        except EOFError:
            why = "ended"
        yield self._failure(item, why)

    def close(self) -> None:
        """Ends the second pytest, and shows the GPUs again."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        if self._visible is None:
            os.environ.pop(_VISIBLE, None)
        else:
            os.environ[_VISIBLE] = self._visible

    def _start(self, tests: list[str]) -> None:
        self._reports, theirs = Pipe(duplex=False)
        environment = {name: value for name, value in os.environ.items() if name != _VISIBLE}
        if self._visible is not None:
            environment[_VISIBLE] = self._visible
        root = self._config.rootpath
        options = [f"--rootdir={root}", f"--tb={self._config.option.tbstyle}", "--gpu"]
        options += ["--capture=sys", *tests]  # what a dying driver says is in the output
        command = f"from tests.gpu_session import main; main({theirs.fileno()}, {options!r})"
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
        self._process = subprocess.Popen(
            [sys.executable, "-c", command],
            pass_fds=[theirs.fileno()],
            env=environment,
            cwd=root,
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
        )
        theirs.close()

    def _failure(self, item: pytest.Item, why: str) -> pytest.TestReport:
        """The second pytest is no more: a failed report of the test that it ran."""
        assert self._process is not None
        self._process.kill()
        code = self._process.wait()
        self._process = None
        self._output.seek(0)
        lines = self._output.read().decode(errors="replace").splitlines()[-_OUTPUT_LINES:]
        told = "\n".join([f"the GPU session {why} (code {code}) during this test", *lines])
        return pytest.TestReport(
            nodeid=item.nodeid,
            location=item.location,
            keywords={},
            outcome="failed",
            longrepr=told,
            when="call",
        )


class _Sender:
    """Plugin of the second pytest: what happens goes through the pipe."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def pytest_configure(self, config: pytest.Config) -> None:
        self._config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._send(
            self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        )

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._send({"finished": nodeid})

    def _send(self, message: object) -> None:
        self._pipe.send(message)


def main(pipe: int, options: list[str]) -> NoReturn:
    """Is the second pytest."""
    sys.exit(pytest.main(options, plugins=[_Sender(Connection(pipe, readable=False))]))
