"""Plans which weights go into which files of an exported directory, and writes them."""

from __future__ import annotations

import json
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import batched, zip_longest
from pathlib import Path

import torch
from torch import Tensor

from megatron.core.models.mimo.errors import ConfigError
from megatron.mimo.checkpoints.folders import ASSETS
from megatron.mimo.checkpoints.match import match_names
from megatron.mimo.convert.assets import CARRIED_FILE, NameIndex
from megatron.mimo.convert.meter import Meter
from megatron.mimo.convert.stacked import join, parts_of
from megatron.mimo.convert.weights import WeightsFile, make_header, part_of, weights_of
from megatron.mimo.models.common.keys import KeyTable

__all__ = ["Kind", "Output", "Sink", "data_size", "plan_output"]


@dataclass(frozen=True, kw_only=True)
class Output:
    """Files to be written.

    Attributes:
        headers: file name -> header.
        index: content of the index file, or None for none.
        aliases: canonical name -> names that the files give the weight, at least one.
    """

    headers: Mapping[str, str]
    index: str | None
    aliases: Mapping[str, tuple[str, ...]]


# Dtype and shape of a weight.
type Kind = tuple[torch.dtype, tuple[int, ...]]


def plan_output(
    table: KeyTable, kinds: Mapping[str, Kind], known: NameIndex | None, max_shard_size: int
) -> Output:
    """Which weights go into which files, under which names."""
    if known is None:
        headers = _new_headers(join(kinds), max_shard_size)
        index = _index(headers) if len(headers) > 1 else None
        return Output(headers=headers, index=index, aliases={name: (name,) for name in kinds})
    listed = {
        file: list(weights_of(header, file=file, start=0)) for file, header in known.headers.items()
    }
    names = [
        part.name
        for several in listed.values()
        for weight in several
        for part in parts_of(weight, table)
    ]
    match = match_names(names, table, source=f"{ASSETS} of the checkpoint")
    aliases: dict[str, tuple[str, ...]] = {}
    for canonical, name in match.given.items():
        copies = tuple(copy for copy, origin in match.copies.items() if origin == canonical)
        aliases[canonical] = (name, *copies)
    aliases |= {name: (name,) for name in match.carried}
    lost = [name for name in match.carried if name not in kinds]
    if lost:
        raise ConfigError(
            f"{len(lost)} weights that the model does without, such as {lost[0]}, are not in "
            f"{ASSETS}/{CARRIED_FILE}; copy the folder {ASSETS} of the imported checkpoint"
        )
    by_file_name = join(
        {name: kinds[origin] for origin, several in aliases.items() for name in several}
    )
    headers, changed = {}, False
    for file, header in known.headers.items():
        same = all(
            by_file_name[weight.name] == (weight.dtype, weight.shape) for weight in listed[file]
        )
        changed |= not same
        headers[file] = (
            header
            if same
            else make_header(
                [(weight.name, *by_file_name[weight.name]) for weight in listed[file]],
                metadata=json.loads(header).get("__metadata__"),
            )
        )
    index = _index(headers) if changed and known.index is not None else known.index
    return Output(headers=headers, index=index, aliases=aliases)


def _new_headers(kinds: Mapping[str, Kind], max_shard_size: int) -> dict[str, str]:
    """As few files as the size allows, in the order of the names given."""
    shards: list[list[tuple[str, torch.dtype, tuple[int, ...]]]] = [[]]
    filled = 0
    for name, (dtype, shape) in kinds.items():
        size = dtype.itemsize * torch.Size(shape).numel()
        if shards[-1] and filled + size > max_shard_size:
            shards.append([])
            filled = 0
        shards[-1].append((name, dtype, shape))
        filled += size
    if len(shards) == 1:
        return {"model.safetensors": make_header(shards[0])}
    return {
        f"model-{number:05d}-of-{len(shards):05d}.safetensors": make_header(shard)
        for number, shard in enumerate(shards, start=1)
    }


def _index(headers: Mapping[str, str]) -> str:
    weights = [
        weight
        for file, header in headers.items()
        for weight in weights_of(header, file=file, start=0)
    ]
    content = {
        "metadata": {
            "total_parameters": sum(torch.Size(weight.shape).numel() for weight in weights),
            "total_size": sum(weight.size for weight in weights),
        },
        "weight_map": {weight.name: weight.file for weight in weights},
    }
    return json.dumps(content, indent=2) + "\n"


def data_size(header: str) -> int:
    """Bytes of the tensors that a header describes."""
    return sum(weight.size for weight in weights_of(header, file="", start=0))


class Sink:
    """The files of an export, open for tensors from any thread; the last tensor closes each."""

    def __init__(self, folder: Path, output: Output, meter: Meter) -> None:
        self._aliases = output.aliases
        self._meter = meter
        self._files = {
            file: WeightsFile(folder / file, header) for file, header in output.headers.items()
        }
        self._places = {
            weight.name: (file, weight.dtype)
            for file, header in output.headers.items()
            for weight in weights_of(header, file=file, start=0)
        }
        written = (name for names in output.aliases.values() for name in names)
        self._left = Counter(self._place(name)[0] for name in written)
        self._lock = threading.Lock()

    @property
    def is_complete(self) -> bool:
        """Whether all files have all of their tensors, and are on the disk."""
        return not any(self._left.values())

    def write(self, canonical: str, tensor: Tensor) -> None:
        """Write a weight under every name that the files give it, in the files' dtype."""
        for name in self._aliases[canonical]:
            file, dtype = self._place(name)
            self._files[file].write(name, tensor.to(dtype))
            self._meter.add(tensor.numel() * dtype.itemsize)
            with self._lock:
                self._left[file] -= 1
                is_last = not self._left[file]
            if is_last:
                self._files[file].close()

    def _place(self, name: str) -> tuple[str, torch.dtype]:
        """File and dtype of a weight, or of a part of one."""
        return self._places[part_of(name)[0]]

    def in_turn[Item](
        self, items: Iterable[Item], canonical: Callable[[Item], str], *, threads: int
    ) -> list[Item]:
        """An order in which threads write to files of their own: a file takes one at a time.

        Args:
            items: what is to be converted.
            canonical: name of the first weight that an item becomes.
            threads: how many take the next item, in turn.
        """
        by_file: dict[str, list[Item]] = defaultdict(list)
        for item in items:
            file, _ = self._place(self._aliases[canonical(item)][0])
            by_file[file].append(item)
        together = [zip_longest(*several) for several in batched(by_file.values(), threads)]
        return [item for rows in together for row in rows for item in row if item is not None]
