"""Draws from several sources by weight, in one order that every rank follows."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, overload

from megatron.core.models.mimo.errors import ConfigError
from megatron.mimo.data.formats import RawRecord
from megatron.mimo.data.sources.opening import files_of, is_read_in_order, open_file
from megatron.mimo.data.sources.orders import IndexedOrder, Order, StreamingOrder
from megatron.mimo.data.sources.permutation import random_fraction, random_int
from megatron.mimo.data.sources.record_file import RecordFile
from megatron.mimo.data.sources.specification import MixtureSpec, SourceSpec

__all__ = ["Draw", "Mixture", "Source", "SourceFiles"]

_OPEN_FILES = 64  # that a process keeps open for each source


class Draw(NamedTuple):
    """A record by numbers: its source, the file of the source, the record in it, and the epoch."""

    source: int
    file: int
    record: int
    epoch: int = 0


class SourceFiles(Sequence[RecordFile]):
    """Files of a source, each opened when it is asked for."""

    def __init__(self, paths: Sequence[Path], index_folder: Path) -> None:
        self.paths = list(paths)
        self._index_folder = index_folder
        self._opened: OrderedDict[int, RecordFile] = OrderedDict()

    def __len__(self) -> int:
        return len(self.paths)

    @overload
    def __getitem__(self, index: int) -> RecordFile: ...
    @overload
    def __getitem__(self, index: slice) -> list[RecordFile]: ...
    def __getitem__(self, index: int | slice) -> RecordFile | list[RecordFile]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if index not in self._opened:
            if len(self._opened) >= _OPEN_FILES:
                self._opened.popitem(last=False)
            self._opened[index] = open_file(self.paths[index], self._index_folder)
        self._opened.move_to_end(index)
        return self._opened[index]

    @cached_property
    def fingerprint(self) -> str:
        """A digest of names and sizes, by which a run sees that the files are still the same."""
        found = []
        for number, path in enumerate(self.paths):
            size = sum(self[number].shard_sizes) if path.is_dir() else path.stat().st_size
            found.append(f"{path.name} {size}")
        return hashlib.sha256("\n".join(found).encode()).hexdigest()[:16]


class Source:
    """Files with an order.

    Args:
        spec: what is asked for.
        index_folder: of all indexes.
        seed: of its order; None for the order of the files.
        buffer: of a streaming source.

    Raises:
        InputError: a file cannot be read.
        ConfigError: there are no records.
    """

    def __init__(
        self, spec: SourceSpec, *, index_folder: Path, seed: int | None, buffer: int
    ) -> None:
        self.spec = spec
        self.files = SourceFiles(files_of(spec.paths), index_folder)
        self.is_streaming = spec.order == "streaming" or (
            spec.order == "auto" and any(map(is_read_in_order, self.files.paths))
        )
        self.order: Order = self._streaming(seed, buffer) if self.is_streaming else self._any(seed)

    def _any(self, seed: int | None) -> IndexedOrder:
        sizes = [len(file) for file in self.files]
        if not sum(sizes):
            names = ", ".join(map(str, self.files.paths))
            raise ConfigError(f"{names}: no records; expected at least one")
        limits = [] if self.spec.epochs is None else [round(self.spec.epochs * sum(sizes))]
        limits += [] if self.spec.limit is None else [self.spec.limit]
        return IndexedOrder(sizes, seed=seed, limit=min(limits, default=None))

    def _streaming(self, seed: int | None, buffer: int) -> StreamingOrder:
        epochs = self.spec.epochs
        if epochs is not None and epochs != int(epochs):
            raise ConfigError(
                f"source {self.spec.name!r}: epochs is {epochs}, and a streaming source ends with "
                "a whole pass; give a whole number, or a limit of samples"
            )
        return StreamingOrder(
            self.files,
            seed=seed,
            buffer=buffer,
            limit=self.spec.limit,
            epochs=None if epochs is None else int(epochs),
        )


class Mixture:
    """All sources of a run.

    Which source a draw takes is a function of the seed, the number of the draw, the weights and
    which sources are used up; which record, of the source's own order.

    Args:
        spec: what is asked for.
        index_folder: where indexes of files lie.
        seed: None for one pass in the order of sources and files, as validation reads them.
        buffer: places that a draw from a streaming source chooses among.
    """

    def __init__(
        self, spec: MixtureSpec, *, index_folder: Path, seed: int | None, buffer: int
    ) -> None:
        self.spec = spec
        self.sources = [
            Source(
                one,
                index_folder=index_folder,
                seed=None if seed is None else random_int(seed, number),
                buffer=buffer,
            )
            for number, one in enumerate(spec.sources)
        ]
        self._seed = 0 if seed is None else seed
        self._drawn = 0
        self._ended: set[int] = set()

    @property
    def names(self) -> list[str]:
        """Of the sources."""
        return [one.name for one in self.spec.sources]

    def draw(self, step: int) -> Draw | None:
        """The next record; None when all sources are used up.

        Args:
            step: training step, from 1, whose weights count.
        """
        weights = self.spec.weights(step)
        while True:
            left = [
                (number, weight)
                for number, weight in enumerate(weights)
                if weight and number not in self._ended
            ]
            if not left:
                return None
            number = left[-1][0]
            if len(left) > 1:
                at = random_fraction(self._seed, 2, self._drawn) * sum(w for _, w in left)
                for candidate, weight in left:
                    at -= weight
                    if at < 0:
                        number = candidate
                        break
            place = self.sources[number].order.draw()
            if place is not None:
                self._drawn += 1
                return Draw(number, *place)
            self._ended.add(number)

    def read(self, draw: Draw) -> RawRecord:
        """The record of a draw.

        Raises:
            InputError: it cannot be read.
        """
        source = self.sources[draw.source]
        record = source.files[draw.file][draw.record]
        if draw.epoch:
            record = replace(record, epoch=draw.epoch)
        if source.spec.media_folder is None:
            return record
        return replace(record, media_folder=Path(source.spec.media_folder))

    def state_dict(self) -> dict[str, Any]:
        """Where all sources stand, as JSON can hold it."""
        return {
            "drawn": self._drawn,
            "ended": sorted(self.names[number] for number in self._ended),
            "sources": {
                source.spec.name: {
                    "files": source.files.fingerprint,
                    "streaming": source.is_streaming,
                    **source.order.state_dict(),
                }
                for source in self.sources
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there.

        Raises:
            ConfigError: it is the state of other sources, or of other files.
        """
        kept = state["sources"]
        if set(kept) != set(self.names):
            raise ConfigError(
                f"the checkpoint's data come from {sorted(kept)}, and this run's from "
                f"{sorted(self.names)}; give the same sources, or begin the data anew with "
                "--restart-data"
            )
        for source in self.sources:
            one = kept[source.spec.name]
            if one["files"] != source.files.fingerprint:
                raise ConfigError(
                    f"the files of source {source.spec.name!r} are not those that the checkpoint's "
                    "run has read: a name or a size differs; give the same files, or begin the "
                    "data anew with --restart-data"
                )
            if one["streaming"] != source.is_streaming:
                was = "streaming" if one["streaming"] else "indexed"
                raise ConfigError(
                    f"source {source.spec.name!r} was read in {was} order; give it that order, or "
                    "begin the data anew with --restart-data"
                )
            source.order.load_state_dict(one)
        self._drawn = int(state["drawn"])
        self._ended = {self.names.index(name) for name in state["ended"]}
