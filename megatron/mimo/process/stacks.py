"""Where a process stands, by the stacks that its interpreter writes (``faulthandler``)."""

from __future__ import annotations

import linecache
import os
import re
import signal
import sysconfig
from dataclasses import dataclass

__all__ = ["STACKS", "Frame", "frames_of", "innermost", "is_collective"]

# Asks a rank for its stacks: one that nobody else is known to use, where the system has such.
STACKS = signal.SIGRTMIN + 9 if hasattr(signal, "SIGRTMIN") else signal.SIGUSR2

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+),? in (?P<function>\S+)')
_SEEN = 8  # frames from the innermost, in which a collective shows itself
_COLLECTIVE_FILES = ("/torch/distributed/", "/pipeline_parallel/p2p_communication")
_OTHERS = ("site-packages", "dist-packages", sysconfig.get_paths()["stdlib"], "<frozen")


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One call: a source file, a line of it and the function around it."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        parts = self.file.split(os.sep)
        return f"{os.sep.join(parts[-3:])}:{self.line} in {self.function}"


def frames_of(text: str) -> list[Frame]:
    """The main thread's frames in what ``faulthandler`` has written, innermost first."""
    threads = re.split(r"^(?=(?:Current thread|Thread) )", text, flags=re.MULTILINE)
    current = [part for part in threads if part.startswith("Current thread")]
    for part in (*current[-1:], *threads[-1:]):  # the main thread is written last
        found = [
            Frame(file=match["file"], line=int(match["line"]), function=match["function"])
            for match in _FRAME.finditer(part)
        ]
        if found:
            return found
    return []


def innermost(frames: list[Frame]) -> Frame | None:
    """The innermost frame of code that is neither Python's nor an installed package's, if any."""
    own = [frame for frame in frames if not any(part in frame.file for part in _OTHERS)]
    return next(iter(own or frames), None)


def is_collective(frames: list[Frame]) -> bool:
    """Whether a process waits for others, or for the device, which waits for them."""
    for place, frame in enumerate(frames[:_SEEN]):
        if any(part in frame.file for part in _COLLECTIVE_FILES):
            return True
        if place == 0:
            source = linecache.getline(frame.file, frame.line)
            stdlib = frame.file.startswith(_OTHERS[2]) and "site-packages" not in frame.file
            waits = (".wait(", ".synchronize(", ".item(", ".tolist(", ".cpu(")
            if not stdlib and any(call in source for call in waits):
                return True
    return False
