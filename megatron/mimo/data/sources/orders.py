"""Orders in which the records of a source are drawn, each with a state to go on from.

An order gives places of records, not records: every rank follows it, but reads only what it trains
on. A place depends on the seed, the files and the number of the draw alone.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, Protocol

from megatron.core.models.mimo.errors import ConfigError
from megatron.mimo.data.sources.permutation import Permutation, random_int
from megatron.mimo.data.sources.record_file import RecordFile

__all__ = ["IndexedOrder", "Order", "Place", "StreamingOrder"]

Place = tuple[int, int, int]  # a file of the source, a record of the file, the epoch


class Order(Protocol):
    """Draws places of a source."""

    def draw(self) -> Place | None:
        """The next place; None when the source is used up."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The position, as JSON can hold it."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        ...


class IndexedOrder:
    """All records in a new random order in each epoch; every record may be anywhere.

    Args:
        sizes: records of each file.
        seed: None for the order of the files.
        limit: draws, all epochs together; None for no end.
    """

    def __init__(self, sizes: Sequence[int], *, seed: int | None, limit: int | None) -> None:
        self._ends = list(accumulate(sizes))
        self._seed = seed
        self._limit = limit
        self._drawn = 0
        if not self._ends or not self._ends[-1]:
            raise ConfigError("a source has no records; expected at least one")

    def draw(self) -> Place | None:
        """The next place."""
        if self._limit is not None and self._drawn >= self._limit:
            return None
        epoch, number = divmod(self._drawn, self._ends[-1])
        self._drawn += 1
        if self._seed is not None:
            number = Permutation(self._ends[-1], self._seed, epoch)[number]
        file = bisect_right(self._ends, number)
        return file, number - (self._ends[file - 1] if file else 0), epoch

    def state_dict(self) -> dict[str, Any]:
        """How many were drawn."""
        return {"drawn": self._drawn}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._drawn = int(state["drawn"])


class StreamingOrder:
    """Files in a new random order in each epoch, each from shard to shard, through a buffer.

    A draw takes a random place out of the buffer, which is filled up from the file that is being
    read. Files are opened when their turn comes; a pass ends when all have been drawn from.

    Args:
        files: of the source, opened when they are asked for.
        seed: None for the order of the files, without a buffer.
        buffer: places that a draw chooses among.
        limit: draws, all epochs together; None for no end.
        epochs: passes; None for no end.
    """

    def __init__(
        self,
        files: Sequence[RecordFile],
        *,
        seed: int | None,
        buffer: int,
        limit: int | None = None,
        epochs: int | None = None,
    ) -> None:
        self._files = files
        self._seed = seed
        self._room = 1 if seed is None else buffer
        self._limit = limit
        self._epochs = epochs
        self._drawn = 0
        self._epoch = 0
        self._turn = 0  # how many files of the epoch are read or being read
        self._at = 0  # records of the current file that have gone into the buffer
        self._buffer: list[tuple[int, int]] = []  # places of this epoch
        self._given = 0  # of this epoch
        self._open: tuple[int, int, list[int]] | None = None  # epoch, turn, starts of its shards

    def draw(self) -> Place | None:
        """The next place."""
        if self._limit is not None and self._drawn >= self._limit:
            return None
        self._fill()
        if not self._buffer:
            if not self._given:
                raise ConfigError("a source has no records; expected at least one")
            self._epoch, self._turn, self._at, self._given = self._epoch + 1, 0, 0, 0
            if self._epochs is not None and self._epoch >= self._epochs:
                self._limit = self._drawn
                return None
            self._fill()
        number = 0
        if self._seed is not None:
            number = random_int(self._seed, 1, self._drawn) % len(self._buffer)
        place, last = self._buffer[number], self._buffer.pop()
        if number < len(self._buffer):
            self._buffer[number] = last
        self._drawn += 1
        self._given += 1
        return *place, self._epoch

    def state_dict(self) -> dict[str, Any]:
        """Position, and what the buffer holds."""
        return {
            "drawn": self._drawn,
            "epoch": self._epoch,
            "turn": self._turn,
            "at": self._at,
            "given": self._given,
            "buffer": [list(place) for place in self._buffer],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._drawn, self._epoch = int(state["drawn"]), int(state["epoch"])
        self._turn, self._at = int(state["turn"]), int(state["at"])
        self._given = int(state["given"])
        self._buffer = [(int(file), int(number)) for file, number in state["buffer"]]
        self._open = None

    def _fill(self) -> None:
        while len(self._buffer) < self._room and self._turn < len(self._files):
            file = self._file_at(self._turn)
            count = len(self._files[file])
            while self._at < count and len(self._buffer) < self._room:
                self._buffer.append((file, self._record(file, self._at)))
                self._at += 1
            if self._at >= count:
                self._turn, self._at = self._turn + 1, 0

    def _file_at(self, turn: int) -> int:
        if self._seed is None:
            return turn
        return Permutation(len(self._files), self._seed, self._epoch)[turn]

    def _record(self, file: int, at: int) -> int:
        """The record that is read at this point of a file, whose shards have an order, too."""
        sizes = self._files[file].shard_sizes
        if self._seed is None or len(sizes) < 2:
            return at
        if self._open is None or self._open[:2] != (self._epoch, file):
            order = Permutation(len(sizes), random_int(self._seed, file), self._epoch)
            self._open = self._epoch, file, [order[place] for place in range(len(sizes))]
        for shard in self._open[2]:
            if at < sizes[shard]:
                return at + sum(sizes[:shard])
            at -= sizes[shard]
        raise AssertionError("a place behind the end of a file")
