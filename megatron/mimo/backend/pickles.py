"""What loading a checkpoint may unpickle: the classes that checkpoints are made of, and no other.

A pickle can call anything that can be imported. Checkpoints of the ``torch_dist`` format have two
kinds of them: the index ``.metadata``, and, in the ``.distcp`` files, what is not a tensor. torch
reads both without a check. Here the first is read by an unpickler that knows the index's own
classes, the second as ``torch.load(weights_only=True)`` reads, with megatron-core's list of types
that hold values and do nothing.
"""

from __future__ import annotations

import importlib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch

__all__ = ["load_index", "load_object", "loading_objects", "reading_index"]

_METADATA = "torch.distributed.checkpoint.metadata"
_STORAGE = "torch.distributed.checkpoint.filesystem"
_PLANNER = "torch.distributed.checkpoint.planner"
_ADMITTED = {
    *((_METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta")),
    *((_METADATA, name) for name in ("TensorStorageMetadata", "BytesStorageMetadata")),
    *((_METADATA, name) for name in ("ChunkStorageMetadata", "TensorProperties")),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    *((_PLANNER, name) for name in ("SavePlan", "WriteItem", "WriteItemType")),
    *((_PLANNER, name) for name in ("TensorWriteData", "BytesIOWriteData")),
    (_STORAGE, "_StorageInfo"),
    (_STORAGE, "_StoragePrefix"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
}
_DTYPES = frozenset(name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype))


class _IndexUnpickler(pickle.Unpickler):
    """Admits what an index is made of, by exact names: no attribute of an admitted class."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPES:
            return getattr(torch, name)
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no index has")
        return getattr(importlib.import_module(module), name)

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it asks for a persistent object, which no index has")


def load_index(file: IO[bytes]) -> Any:
    """The index in an open ``.metadata``.

    Raises:
        pickle.UnpicklingError: it is none, or would make something else than an index.
        Exception: of nearly any kind, for damaged bytes.
    """
    from torch.distributed.checkpoint.metadata import Metadata

    index = _IndexUnpickler(file).load()
    if not isinstance(index, Metadata):
        raise pickle.UnpicklingError(f"it holds a {type(index).__name__}; expected an index")
    _check_places(index)
    return index


def _check_places(index: Any) -> None:
    """Refuse parts outside of the checkpoint's own folder."""
    for place in (index.storage_data or {}).values():
        path, numbers = place.relative_path, (place.offset, place.length)
        if not isinstance(path, str) or Path(path).name != path or path in ("", ".", ".."):
            raise pickle.UnpicklingError(f"it names the file {path!r}; expected one beside it")
        if not all(isinstance(number, int) and number >= 0 for number in numbers):
            raise pickle.UnpicklingError(f"it places {path} at {numbers}; expected numbers from 0")


def load_object(file: Any) -> Any:
    """What ``torch.save`` has written, of values only.

    Raises:
        pickle.UnpicklingError: it would make something else.
    """
    from megatron.core.safe_globals import register_safe_globals

    register_safe_globals()
    return torch.load(file, map_location="cpu", weights_only=True)


def reading_index(_: Callable[..., Any]) -> Callable[..., Any]:
    """``FileSystemReader.read_metadata`` by :func:`load_index`."""

    def read_metadata(self: Any, *_: Any, **given: Any) -> Any:
        from torch.distributed.checkpoint.metadata import StorageMeta

        with self.fs.create_stream(self._get_metadata_path(given.get("rank")), "rb") as file:
            index = load_index(file)
        index.storage_meta = index.storage_meta or StorageMeta()
        index.storage_meta.load_id = self.load_id
        return index

    return read_metadata


def loading_objects(_: Callable[..., Any]) -> Callable[..., Any]:
    """``DefaultLoadPlanner.load_bytes`` by :func:`load_object`."""

    def load_bytes(self: Any, read_item: Any, value: Any) -> None:
        from torch.distributed.checkpoint._nested_dict import set_element

        name, content = read_item.dest_index.fqn, load_object(value)
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[name], content)
        else:
            self.state_dict[name] = content

    return load_bytes
