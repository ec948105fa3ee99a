"""Files of weights in the safetensors format, read and written one tensor at a time.

The format: 8 bytes with the header's length (little endian), the header (JSON: for every tensor its
dtype, shape, and the first and last byte of its data, counted from the header's end), the data.
Nothing but the tensor that is asked for is ever in memory, and a file's pages are not mapped, so
memory use is what the caller holds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron.core.models.mimo.errors import InputError

__all__ = [
    "DTYPE_NAMES",
    "FLOATS",
    "INDEX_FILE",
    "Weight",
    "WeightSource",
    "Weights",
    "WeightsFile",
    "is_weights_name",
    "make_header",
    "part_of",
    "read_header",
    "read_tensor",
    "weights_of",
]

INDEX_FILE = "model.safetensors.index.json"
_SINGLE_FILE = "model.safetensors"
_SHOWN = 80  # characters of a value that is wrong
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # what --dtype converts, and to
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_POINTER = {b"version ": "it is a pointer of git-lfs: run git lfs pull in its folder"}
_MOST_HEADER_BYTES = 100 * 2**20  # the format's own limit


@dataclass(frozen=True, kw_only=True)
class Weight:
    """Where one tensor is.

    Attributes:
        name: as the file has it.
        file: the file's name.
        dtype: of the tensor.
        shape: of the tensor.
        start: first byte in the file.
        size: bytes.
    """

    name: str
    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int


class WeightSource(Protocol):
    """Weights to be imported."""

    @property
    def by_name(self) -> Mapping[str, Weight]:
        """Every weight."""

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own."""

    def read_part(self, name: str, index: int) -> Tensor:
        """One part along the first axis of a tensor, in memory of its own."""

    def size(self, names: Iterable[str]) -> int:
        """Bytes of some weights."""


class Weights:
    """The weights of a Hugging Face directory: one file, or several with an index.

    Attributes:
        by_name: every weight.
        headers: file name -> header as it stands in the file, without padding.
        index: content of the index file; None where there is one file only.
        notes: words on what was left unread.

    Raises:
        InputError: there are none, the index or a file is damaged, a file is missing, or the index
            names one outside of the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index: str | None = None
        self.headers: dict[str, str] = {}
        self.by_name: dict[str, Weight] = {}
        self.notes: list[str] = []
        mapped = self._read_index()
        for file in sorted(set(mapped.values())) if mapped else [_SINGLE_FILE]:
            header, start = read_header(folder / file)
            self.headers[file] = header
            for weight in weights_of(header, file=file, start=start):
                self.by_name[weight.name] = weight
        strays = [name for name, file in mapped.items() if self._file_of(name) != file]
        if strays:
            raise InputError(
                f"{folder / INDEX_FILE} says that {strays[0]} is in {mapped[strays[0]]}, which is "
                f"not so ({len(strays)} weights in all); the files are not of one model"
            )

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own."""
        weight = self.by_name[name]
        return _read(self.folder / weight.file, weight)

    def read_part(self, name: str, index: int) -> Tensor:
        """One part along the first axis of a tensor, in memory of its own."""
        weight = self.by_name[name]
        size = weight.size // weight.shape[0]
        start = weight.start + index * size
        part = replace(weight, shape=weight.shape[1:], start=start, size=size)
        return _read(self.folder / weight.file, part)

    def size(self, names: Iterable[str]) -> int:
        """Bytes of some weights."""
        return sum(self.by_name[name].size for name in names)

    def _file_of(self, name: str) -> str | None:
        return self.by_name[name].file if name in self.by_name else None

    def _read_index(self) -> dict[str, str]:
        path = self.folder / INDEX_FILE
        if not path.is_file():
            if (self.folder / _SINGLE_FILE).is_file():
                return {}
            raise InputError(
                f"{self.folder} has no {_SINGLE_FILE} and no {INDEX_FILE}{self._hint()}"
            )
        self.index = path.read_text()
        try:
            mapped: dict[str, str] = dict(json.loads(self.index)["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path} is not an index of weights: {error}; fetch it again"
            ) from error
        foreign = [file for file in mapped.values() if not is_weights_name(file)]
        if foreign:
            raise InputError(
                f"{path} names the file {foreign[0]!r}; expected the name of a safetensors file "
                "beside it, without a folder"
            )
        if (self.folder / _SINGLE_FILE).is_file() and set(mapped.values()) != {_SINGLE_FILE}:
            self.index = None
            self.notes.append(
                f"warning: {self.folder} holds two sets of weights, {_SINGLE_FILE} and what "
                f"{INDEX_FILE} names; as in transformers, {_SINGLE_FILE} is read"
            )
            return {}
        missing = sorted({file for file in mapped.values() if not (self.folder / file).is_file()})
        if missing:
            raise InputError(
                f"{self.folder}: {len(missing)} of {len(set(mapped.values()))} files that "
                f"{INDEX_FILE} names are missing: {', '.join(missing[:5])}; fetch them again"
            )
        return mapped

    def _hint(self) -> str:
        if any(self.folder.glob("*.bin")):
            return (
                "; its weights are pickled (*.bin): load the model in transformers and write it "
                "with save_pretrained, which writes safetensors"
            )
        if any(self.folder.glob("*.safetensors")):
            return "; it has safetensors files, but the index that says what is in which is missing"
        return "; expected a Hugging Face model's directory"


class WeightsFile:
    """A file being written: its header is known first, tensors come in any order, from any thread.

    Args:
        path: must not exist.
        header: as :func:`make_header` returns it.
    """

    def __init__(self, path: Path, header: str) -> None:
        encoded = header.encode()
        encoded += b" " * (-len(encoded) % 8)
        self._places = {
            weight.name: weight
            for weight in weights_of(header, file=path.name, start=8 + len(encoded))
        }
        self._file = path.open("xb", buffering=0)
        self._file.write(len(encoded).to_bytes(8, "little") + encoded)
        end = max((place.start + place.size for place in self._places.values()), default=0)
        os.posix_fallocate(self._file.fileno(), 0, max(end, 8 + len(encoded)))

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, or ``name[index]``, a part of one, to its place.

        It must have the header's dtype and shape.
        """
        whole, index = part_of(name)
        place = self._places[whole]
        if index is not None:
            size = place.size // place.shape[0]
            start = place.start + index * size
            place = replace(place, shape=place.shape[1:], start=start, size=size)
        assert (tensor.dtype, tuple(tensor.shape)) == (place.dtype, place.shape), name
        raw = tensor.contiguous().reshape(-1).view(torch.uint8)
        left, offset = memoryview(raw.numpy()), place.start
        while left:
            written = os.pwrite(self._file.fileno(), left[: 2**30], offset)
            left, offset = left[written:], offset + written

    def close(self) -> None:
        """Bring the file to the disk."""
        os.fsync(self._file.fileno())
        self._file.close()


def read_tensor(path: Path, name: str) -> Tensor:
    """One tensor of a file."""
    header, start = read_header(path)
    for weight in weights_of(header, file=path.name, start=start):
        if weight.name == name:
            return _read(path, weight)
    raise InputError(f"{path} has no tensor {name}")


def read_header(path: Path) -> tuple[str, int]:
    """A file's header, and where its data starts.

    Raises:
        InputError: it is no safetensors file, or has another size than its header says.
    """
    actual = path.stat().st_size
    with path.open("rb") as file:
        begins = file.read(8)
        length = int.from_bytes(begins, "little")
        if not 0 < length <= min(_MOST_HEADER_BYTES, actual - 8):
            raise InputError(
                f"{path} is not a whole safetensors file (it has {actual} bytes and announces a "
                f"header of {length}); {_POINTER.get(begins, 'fetch it again')}"
            )
        raw = file.read(length)
    try:
        header = raw.decode().rstrip(" ")
        weights = weights_of(header, file=path.name, start=8 + length)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} has a damaged header: {error}; fetch it again") from error
    needed = max((weight.start + weight.size for weight in weights), default=8 + length)
    if actual != needed:
        raise InputError(f"{path} has {actual} bytes, expected {needed}: fetch it again")
    return header, 8 + length


def weights_of(header: str, *, file: str, start: int) -> list[Weight]:
    """The tensors that a header describes, in its order.

    Args:
        header: JSON.
        file: the file's name.
        start: where its data starts.

    Raises:
        ValueError: the header is not consistent.
    """
    weights = []
    for name, entry in json.loads(header, object_pairs_hook=_each_once).items():
        if name == "__metadata__":
            continue
        first, last = entry["data_offsets"]
        if not all(type(number) is int and number >= 0 for number in (first, *entry["shape"])):
            raise ValueError(
                f"{name} has the shape {str(entry['shape'])[:_SHOWN]} and begins at "
                f"{str(first)[:_SHOWN]}; expected whole numbers from 0"
            )
        if entry["dtype"] not in _DTYPES:
            dtype_name = str(entry["dtype"])[:_SHOWN]
            raise ValueError(f"{name} has the dtype {dtype_name}, which is not known here")
        dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
        size = dtype.itemsize * torch.Size(shape).numel()
        if last - first != size:
            raise ValueError(f"{name} has {last - first} bytes, expected {size}")
        weights.append(
            Weight(name=name, file=file, dtype=dtype, shape=shape, start=start + first, size=size)
        )
    _check_places(weights, start)
    return weights


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("it has one name twice")
    return content


def _check_places(weights: list[Weight], start: int) -> None:
    """The format's own rule: the data of tensors follow each other, without gaps, and in no other.

    Raises:
        ValueError: they do not.
    """
    end = start
    for weight in sorted(weights, key=lambda one: (one.start, one.size)):
        if weight.start != end:
            raise ValueError(
                f"{weight.name} begins at byte {weight.start - start} of the data; expected "
                f"{end - start}, where the tensor before it ends"
            )
        end = weight.start + weight.size


def part_of(name: str) -> tuple[str, int | None]:
    """``name[3]``, the fourth part along the first axis of a weight, as ``(name, 3)``.

    A name without a number in square brackets is that of a whole weight: ``(name, None)``.
    """
    whole, _, number = name.removesuffix("]").rpartition("[")
    return (whole, int(number)) if whole and name.endswith("]") else (name, None)


def is_weights_name(name: Any) -> bool:
    """Whether this is the plain name of a safetensors file, without a folder."""
    return isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name


def make_header(
    tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]],
    *,
    metadata: Mapping[str, str] | None = None,
) -> str:
    """The header of a file that holds these tensors one after the other."""
    header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    offset = 0
    for name, dtype, shape in tensors:
        end = offset + dtype.itemsize * torch.Size(shape).numel()
        header[name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    return json.dumps(header, separators=(",", ":"), ensure_ascii=False)


def _read(path: Path, weight: Weight) -> Tensor:
    raw = torch.empty(weight.size, dtype=torch.uint8)
    left = memoryview(raw.numpy())
    with path.open("rb", buffering=0) as file:
        file.seek(weight.start)
        while left:
            count = file.readinto(left[: 2**30])
            if not count:
                raise InputError(f"{path} ended while it was read; fetch it again")
            left = left[count:]
    return raw.view(weight.dtype).view(weight.shape)
