"""Checkpoints of megatron-core's format ("torch_dist"), read and written one tensor at a time.

The format is torch.distributed.checkpoint's: files that hold tensors, each as ``torch.save`` writes
it, and a pickled index, ``.metadata``, from the global name and offset of every piece to its place
in a file; beside them Megatron's ``metadata.json``, and an object with what is not a tensor.
"""

from __future__ import annotations

import io
import os
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import (
    BytesStorageMetadata,
    FileSystemWriter,
    Metadata,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.storage import WriteResult

from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.models.mimo.errors import ConfigError, InputError
from megatron.core.models.mimo.submodules.state import WITHOUT_EXTRA_STATE
from megatron.mimo.backend.pickles import load_index
from megatron.mimo.checkpoints.assets import changed_asset
from megatron.mimo.checkpoints.folders import ASSETS, newest, require_whole, write_text
from megatron.mimo.checkpoints.hashed_saving import hash_checkpoint
from megatron.mimo.checkpoints.hashes import FileHash, HashedWrites
from megatron.mimo.checkpoints.inspection import Inspector, problem
from megatron.mimo.checkpoints.slots import STATE_METADATA
from megatron.mimo.checkpoints.tracker import RELEASE, TRACKER, is_iteration

__all__ = [
    "CheckpointFile",
    "CheckpointReader",
    "finish_checkpoint",
    "locate",
    "without_checksums",
]


# Not a tensor, and not of a run: what a Megatron that starts from these weights asks for.
_COMMON = {
    "iteration": 0,
    "checkpoint_version": 3.0,  # before 2.0, queries, keys and values were laid out otherwise
    "content_metadata": {**STATE_METADATA, WITHOUT_EXTRA_STATE: True},
}


class CheckpointFile:
    """One file of a checkpoint being written, by one thread.

    Args:
        folder: of the checkpoint.
        number: of the file.
    """

    def __init__(self, folder: Path, number: int) -> None:
        self.name = f"__{number}_0.distcp"
        self._file = (folder / self.name).open("xb")
        self._hashed = HashedWrites(self._file)
        self.pieces: list[tuple[ShardedTensor, WriteResult]] = []

    def write(self, piece: ShardedTensor) -> None:
        """Append one piece of a global tensor; its data may be given up afterwards."""
        tensor: Tensor = piece.data.view((1,) * piece.prepend_axis_num + tuple(piece.local_shape))
        if tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor = tensor.clone()  # torch.save would write all of the storage
        index = MetadataIndex(piece.key, torch.Size(piece.global_offset))
        start = self._hashed.size
        torch.save(tensor, cast(IO[bytes], self._hashed))
        length = self._hashed.size - start
        info = _StorageInfo(self.name, start, length)
        result = WriteResult(index=index, size_in_bytes=length, storage_data=info)
        self.pieces.append((piece.without_data(), result))

    @property
    def hash(self) -> FileHash:
        """Of all that was written so far."""
        return self._hashed.hash

    def close(self) -> None:
        """Bring the file to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


@contextmanager
def without_checksums() -> Iterator[None]:
    """Let ``torch.save`` leave out what no reader of torch checks, and what takes half its time."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def finish_checkpoint(
    root: Path, files: Sequence[CheckpointFile], objects: Sequence[ShardedObject]
) -> None:
    """Write all that makes ``root`` a checkpoint that a run can start from, once its files are.

    Args:
        root: what ``--load`` takes; the files are in its ``release`` folder.
        files: all of them, closed.
        objects: what layers save that is not a tensor.
    """
    folder = root / RELEASE
    written = [part for file in files for part in file.pieces]
    results = [result for _, result in written]
    chunks: dict[str, list[ChunkStorageMetadata]] = defaultdict(list)
    kinds: dict[str, tuple[TensorProperties, tuple[int, ...]]] = {}
    for piece, _ in written:
        sizes = (*(1 for _ in range(piece.prepend_axis_num)), *piece.local_shape)
        chunks[piece.key].append(
            ChunkStorageMetadata(torch.Size(piece.global_offset), torch.Size(sizes))
        )
        kinds[piece.key] = TensorProperties(dtype=piece.dtype), tuple(piece.global_shape)
    described: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {
        key: TensorStorageMetadata(properties, torch.Size(shape), chunks[key])
        for key, (properties, shape) in kinds.items()
    }
    for result in _write_objects(
        folder, [ShardedObject("common_state", _COMMON, (1,), (0,)), *objects]
    ):
        described[result.index.fqn] = BytesStorageMetadata()
        results.append(result)
    FileSystemWriter(folder).finish(Metadata(state_dict_metadata=described), [results])
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))
    hash_checkpoint(folder, known={file.name: file.hash for file in files})
    write_text(root / TRACKER, RELEASE)


class CheckpointReader:
    """Reads weights of a checkpoint of any layout, as if each were one tensor.

    Args:
        folder: ``iter_...`` or ``release``.

    Raises:
        ConfigError: it is not a complete checkpoint of this format.
    """

    def __init__(self, folder: Path) -> None:
        trouble = problem(folder)
        if trouble is not None:
            raise ConfigError(f"checkpoint {folder} cannot be used: {trouble}")
        if not (folder / ".metadata").is_file():
            raise ConfigError(
                f"checkpoint {folder} cannot be used: it was written with --ckpt-format torch; "
                "expected torch_dist (the default): train an iteration more with that"
            )
        self.folder = folder
        with (folder / ".metadata").open("rb") as file:
            metadata = load_index(file)
        self._tensors = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self._places = metadata.storage_data or {}

    def __contains__(self, key: str) -> bool:
        return key in self._tensors

    def shape(self, key: str) -> tuple[int, ...]:
        """Of a global tensor.

        Raises:
            InputError: the checkpoint does not have it.
        """
        return tuple(self._entry(key).size)

    def dtype(self, key: str) -> torch.dtype:
        """Of a global tensor."""
        dtype: torch.dtype = self._entry(key).properties.dtype
        return dtype

    def read(self, key: str, start: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """A region of a global tensor, put together from the pieces it was saved in.

        Args:
            key: of the global tensor.
            start: first index along every axis.
            sizes: of the region along every axis.

        Raises:
            InputError: parts of the region are not in the checkpoint.
        """
        region: Tensor | None = None
        found = 0
        for chunk in self._entry(key).chunks:
            window = _overlap(start, sizes, chunk.offsets, chunk.sizes)
            if window is None:
                continue
            piece = self._load(key, chunk).view(tuple(chunk.sizes))
            if tuple(chunk.offsets) == tuple(start) and tuple(chunk.sizes) == tuple(sizes):
                return piece
            if region is None:
                region = torch.empty(tuple(sizes), dtype=piece.dtype)
            inside, into = window
            found += region[into].copy_(piece[inside]).numel()
        if region is None or found != region.numel():
            raise InputError(
                f"{self.folder} does not hold all of {key} (from {list(start)}, size "
                f"{list(sizes)}): it is not of this model, or of a part of it"
            )
        return region

    def _entry(self, key: str) -> TensorStorageMetadata:
        if key not in self._tensors:
            raise InputError(
                f"{self.folder} has no tensor {key}: it is not of the model that its "
                f"{ASSETS}/config.json describes"
            )
        return self._tensors[key]

    def _load(self, key: str, chunk: ChunkStorageMetadata) -> Tensor:
        place = self._places[MetadataIndex(key, chunk.offsets)]
        with (self.folder / place.relative_path).open("rb") as file:
            window = _Window(file, place.offset, place.length)
            try:
                tensor: Tensor = torch.load(
                    cast(IO[bytes], window), map_location="cpu", weights_only=True
                )
            except Exception as error:
                raise InputError(
                    f"{self.folder / place.relative_path} is damaged: {key} cannot be read from "
                    f"it: {type(error).__name__}; name another iteration, or restore the file"
                ) from error
        return tensor


class _Window(io.RawIOBase):
    """A part of a file that looks like a file."""

    def __init__(self, file: io.BufferedReader, start: int, length: int) -> None:
        self._handle = file.fileno()
        self._start = start
        self._length = length
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        left = memoryview(buffer)[: max(0, self._length - self._at)]
        total = 0
        while left:
            count = os.preadv(self._handle, [left[: 2**30]], self._start + self._at)
            if not count:
                break
            left, self._at, total = left[count:], self._at + count, total + count
        return total


def locate(
    checkpoint: Path,
    *,
    iteration: int | None = None,
    described: bool = True,
    inspector: Inspector | None = None,
) -> tuple[Path, Path]:
    """The root of a checkpoint, and the folder with the weights to use, which are whole.

    A checkpoint that is passed over, being damaged, is told on standard error.

    Args:
        checkpoint: a root, or one of its ``iter_...`` folders.
        iteration: another than the newest.
        described: it has to have a folder ``hf``.
        inspector: of all ranks that call it; by default this process looks alone.

    Raises:
        ConfigError: there is none, it is damaged, or it has no folder ``hf``.
    """
    inspector = inspector or Inspector()
    root, folder = checkpoint, checkpoint
    if is_iteration(checkpoint):
        root = checkpoint.absolute().parent
        require_whole(checkpoint, inspector)
    else:
        folder = newest(checkpoint, iteration, inspector=inspector)
    if inspector.hashes:
        broken = changed_asset(root / ASSETS, weights=True)
        if broken is not None:
            raise ConfigError(broken)
        inspector.said += filter(None, [changed_asset(root / ASSETS)])
    for text in inspector.said if inspector.ranks.rank == 0 else ():
        sys.stderr.write(f"warning: {text}\n")
    if described and not (root / ASSETS / "config.json").is_file():
        raise ConfigError(
            f"{root} has no {ASSETS}/config.json, which says what model it is; copy the folder "
            f"{ASSETS} of the checkpoint that the run started from to {root / ASSETS}"
        )
    return root, folder


def _overlap(
    start: Sequence[int], sizes: Sequence[int], other: Sequence[int], other_sizes: Sequence[int]
) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """Where a piece and a region meet, as slices of the piece and of the region."""
    inside, into = [], []
    for mine, size, theirs, their_size in zip(start, sizes, other, other_sizes, strict=True):
        first, last = max(mine, theirs), min(mine + size, theirs + their_size)
        if first >= last:
            return None
        inside.append(slice(first - theirs, last - theirs))
        into.append(slice(first - mine, last - mine))
    return tuple(inside), tuple(into)


def _write_objects(folder: Path, objects: Sequence[ShardedObject]) -> list[WriteResult]:
    name = "__objects_0.distcp"
    results = []
    with (folder / name).open("xb") as file:
        for one in objects:
            start = file.tell()
            torch.save([one.data], file)
            length = file.tell() - start
            info = _StorageInfo(name, start, length)
            index = MetadataIndex(one.unique_key)
            results.append(WriteResult(index=index, size_in_bytes=length, storage_data=info))
        file.flush()
        os.fsync(file.fileno())
    return results
