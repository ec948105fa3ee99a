"""A folder of this host in which the ranks of one job say what they do and how they end.

A rank has a slot of a few bytes, which it maps into its memory: to say what it does is a write to
memory. The witness (``witness.py``) reads the slots of all ranks, those of killed ones included.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import struct
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron.mimo.process.identity import Process

__all__ = ["Board", "Slot", "SlotContent", "Word", "boards_of", "folder_of"]

_LAYOUT = struct.Struct(
    "<q40sqqdq48s?48s"
)  # pid, its start, rank, iteration, since, count, phase, done, part
_WRITTEN_LATER = struct.Struct("<qdq48s")  # iteration, since, count, phase
_LATER = struct.calcsize("<q40sq")
_DONE = struct.calcsize("<q40sqqdq48s")
_PART = struct.calcsize("<q40sqqdq48s?")


@dataclass(frozen=True, kw_only=True)
class Word:
    """What a rank says of its end.

    Attributes:
        kind: ``refused`` (its arguments), ``failed``, ``lost`` (another rank is to blame) or
            ``stopped`` (as it was asked to).
        text: one line.
        when: seconds of the machine's monotonic clock.
        rank: who says it.
        printed: whether the rank has printed the text itself.
    """

    kind: str
    text: str
    when: float
    rank: int
    printed: bool


@dataclass(frozen=True, kw_only=True)
class SlotContent:
    """A rank as its slot shows it.

    Attributes:
        process: the rank's.
        rank: its number in the job.
        iteration: the one that it works on; 0 before the first.
        phase: what it does.
        since: when it began to, on the machine's monotonic clock.
        count: how many phases it has begun.
        done: whether it has said that it ends well.
        part: what it has of the model, where ranks differ: ``images``, ``language stage 1``.
    """

    process: Process
    rank: int
    iteration: int
    phase: str
    since: float
    count: int
    done: bool
    part: str = ""

    def where(self) -> str:
        """Part, iteration and phase, for a message."""
        return place(self.part, self.iteration, self.phase)


def place(part: str, iteration: int, phase: str) -> str:
    """Where a rank is, for a message; what is not known is left out."""
    at = f"iteration {iteration}" if iteration else ""
    return ", ".join(filter(None, (part, at, phase)))


class Slot:
    """A rank's own place on the board; without a file it is memory that nobody else sees."""

    def __init__(self, path: Path | None = None, *, rank: int = 0) -> None:
        self._memory: mmap.mmap | bytearray = bytearray(_LAYOUT.size)
        self._iteration = 0
        self._count = 0
        self._phase = b"starting"
        own = Process.of(os.getpid())
        self.part = ""
        state = (rank, 0, time.monotonic(), 0, self._phase, False, b"")
        content = (own.pid, own.started.encode(), *state)
        if path is not None:
            fresh = path.with_name(f".{path.name}")
            fresh.write_bytes(_LAYOUT.pack(*content))
            with fresh.open("r+b") as file:
                self._memory = mmap.mmap(file.fileno(), _LAYOUT.size)
            fresh.replace(path)

    def enter(self, phase: str) -> None:
        """Begin a phase: ``forward``, for example."""
        self._phase = phase.encode()
        self._write()

    def begin(self, iteration: int) -> None:
        """Begin an iteration, in the same phase."""
        self._iteration = iteration
        self._write()

    def has(self, part: str) -> None:
        """Say what this rank has of the model."""
        self.part = part
        self._put(_PART, struct.pack("48s", part.encode()))

    @property
    def phase(self) -> str:
        """The phase that was begun last."""
        return self._phase.decode()

    @property
    def iteration(self) -> int:
        """The iteration that was begun last."""
        return self._iteration

    def done(self) -> None:
        """Say that this rank is about to end well."""
        self._put(_DONE, b"\1")

    @property
    def is_done(self) -> bool:
        """Whether this rank has said that it ends well."""
        return self._memory[_DONE] != 0

    def _write(self) -> None:
        self._count += 1
        said = self._iteration, time.monotonic(), self._count, self._phase
        self._put(_LATER, _WRITTEN_LATER.pack(*said))

    def _put(self, at: int, data: bytes) -> None:
        """Write over what is there: ``pack_into`` puts zeros first, which the witness would see."""
        self._memory[at : at + len(data)] = data


class Board:
    """The folder as the ranks and the witness use it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def take_slot(self, rank: int) -> Slot:
        """This rank's slot."""
        return Slot(self.folder / f"rank-{rank}", rank=rank)

    def is_first(self) -> bool:
        """Whether nobody has asked this before; some launchers call every rank the first."""
        try:
            (self.folder / "first").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def slots(self) -> dict[int, SlotContent]:
        """What all ranks of this host show, by rank."""
        found = {}
        for path in self.folder.glob("rank-*"):
            data = path.read_bytes()
            if len(data) == _LAYOUT.size:
                pid, started, rank, iteration, since, count, phase, *others = _LAYOUT.unpack(data)
                found[rank] = SlotContent(
                    process=Process(pid=pid, started=_text(started)),
                    rank=rank,
                    iteration=iteration,
                    phase=_text(phase),
                    since=since,
                    count=count,
                    done=others[0],
                    part=_text(others[1]),
                )
        return found

    def say(self, word: Word) -> None:
        """Leave a rank's last word; the first that it says stays."""
        path = self.folder / f"word-{word.rank}"
        if not path.exists():
            replace_text(path, json.dumps(asdict(word)))

    def words(self) -> list[Word]:
        """All last words, first ones first."""
        found = [Word(**json.loads(path.read_text())) for path in self.folder.glob("word-*")]
        return sorted(found, key=lambda word: word.when)

    def traceback_file(self, rank: int) -> Path:
        """Where the interpreter of a rank writes its stacks, when it crashes or is asked."""
        return self.folder / f"stacks-{rank}"

    def witness_lives(self) -> bool:
        """Whether a witness watches."""
        with contextlib.suppress(OSError, ValueError):
            pid, started = self.witness_file.read_text().split()
            return Process(pid=int(pid), started=started.strip("-")).lives()
        return False

    @property
    def witness_file(self) -> Path:
        """Names the witness's process once it watches."""
        return self.folder / "witness"

    @property
    def verdict_file(self) -> Path:
        """What the witness found: ``well``, or the cause of the job's end."""
        return self.folder / "verdict"


def boards_of(launcher: Process) -> list[Path]:
    """The boards of all ranks that a process of this host has started, those of restarts too."""
    return sorted(_root().glob(f"{_stem(launcher)}-*"))


def folder_of(launcher: Process, *names: str) -> Path:
    """The board of the ranks that a process has started: the same for all of them.

    Args:
        launcher: the process.
        names: what tells this start from the launcher's others.
    """
    digest = hashlib.sha256("\0".join(names).encode()).hexdigest()[:12]
    return _root() / f"{_stem(launcher)}-{digest}"


def _stem(launcher: Process) -> str:
    return f"{launcher.pid}-{hashlib.sha256(launcher.started.encode()).hexdigest()[:12]}"


def _root() -> Path:
    user = os.getuid() if hasattr(os, "getuid") else 0
    root = Path(tempfile.gettempdir()) / f"megatron-mimo-{user}"
    root.mkdir(mode=0o700, exist_ok=True)
    if hasattr(os, "getuid") and root.stat().st_uid != user:
        raise PermissionError(f"{root} belongs to another user")
    return root


def replace_text(path: Path, text: str) -> None:
    """Write a file in one step, by a name that no reader looks for."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.write_text(text)
    fresh.replace(path)


def _text(field: bytes) -> str:
    return field.rstrip(b"\0").decode(errors="replace")
