"""Hugging Face directory -> checkpoint, streamed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.models.mimo.errors import InputError
from megatron.mimo.arguments.standalone import build_model, model_settings, process_groups
from megatron.mimo.checkpoints.assets import hash_assets
from megatron.mimo.checkpoints.folders import ASSETS, RELEASE
from megatron.mimo.checkpoints.match import Match, check_shapes, match_names
from megatron.mimo.checkpoints.slots import Slot, match_slots, model_objects, model_slots
from megatron.mimo.checkpoints.torch_dist import (
    CheckpointFile,
    finish_checkpoint,
    without_checksums,
)
from megatron.mimo.checkpoints.weights import make_parameter
from megatron.mimo.convert.assets import (
    carry_weights,
    check_placeholders,
    copy_assets,
    write_name_index,
)
from megatron.mimo.convert.meter import Meter
from megatron.mimo.convert.stacked import unstacked
from megatron.mimo.convert.staging import check_target, whole_directory
from megatron.mimo.convert.threads import default_threads, in_threads
from megatron.mimo.convert.ties import config_of_files, say_untied
from megatron.mimo.convert.weights import FLOATS, Weights, WeightSource
from megatron.mimo.models import family_of, read_hf_config
from megatron.mimo.models.common.family import Family
from megatron.mimo.models.common.keys import KeyEntry, KeyTable

__all__ = [
    "Imported",
    "Parameter",
    "import_model",
    "import_weights",
    "meta_model",
    "write_parameters",
]

_FILE_BYTES = 2 * 10**9  # a file of a checkpoint is closed when it has these
_MARGIN = 64 * 2**20  # bytes of everything that is not a weight


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One parameter to be written.

    Attributes:
        slot: its place.
        size: bytes.
        order: where it is read from; neighbours are written one after the other.
        make: the whole parameter.
    """

    slot: Slot
    size: int
    order: tuple[str, int]
    make: Callable[[], Tensor]


@dataclass(frozen=True, kw_only=True)
class Imported:
    """A model to be imported.

    Attributes:
        family: its family.
        config: its Hugging Face configuration.
        model: as :func:`meta_model` makes it.
        weights: under Hugging Face's names, in any spelling that the family knows.
        source: where they are from, for errors.
        write_assets: writes everything that is not a weight into a new folder.
        notes: further words for a human.
    """

    family: Family
    config: Any
    model: Any
    weights: WeightSource
    source: str
    write_assets: Callable[[Path], None]
    notes: Sequence[str] = ()


def import_model(
    source: Path,
    target: Path,
    *,
    dtype: torch.dtype | None = None,
    threads: int | None = None,
    shown: bool = True,
) -> str:
    """Write a checkpoint that a run of any layout can start from (``--load``).

    In memory are, for each thread, the Hugging Face weights of one parameter and the parameter.

    Args:
        source: a Hugging Face model's directory, with weights in the safetensors format.
        target: a new directory.
        dtype: of floating-point weights in the checkpoint; those of the files by default.
        threads: that read and write; as many as there are processors, at most 4, by default.
        shown: draw a progress bar on a terminal.

    Returns:
        What was done, for a human.

    Raises:
        ConfigError, UnsupportedError, InputError: see docs/conversion.md; nothing is left behind.
    """
    check_target(target, source=source)
    config = read_hf_config(source)
    family = family_of(config)
    vocab_size = config.get_text_config().vocab_size
    check_placeholders(source, family.media(config).special_token_ids, vocab_size=vocab_size)
    weights = Weights(source)
    said, (config, untied) = config, config_of_files(family, config, weights, source=str(source))

    def write_assets(folder: Path) -> None:
        copy_assets(source, folder)
        write_name_index(weights, folder)
        if config is not said:
            say_untied(folder / "config.json")

    with meta_model(family, config) as model:
        imported = Imported(
            family=family,
            config=config,
            model=model,
            weights=weights,
            source=str(source),
            write_assets=write_assets,
            notes=[*weights.notes, *untied],
        )
        return import_weights(imported, target, dtype=dtype, threads=threads, shown=shown)


def import_weights(
    imported: Imported,
    target: Path,
    *,
    dtype: torch.dtype | None,
    threads: int | None,
    shown: bool,
) -> str:
    """Write a checkpoint; arguments, result and errors are those of :func:`import_model`."""
    weights, table = unstacked(imported.weights, imported.family.keys(imported.config))
    match = match_names(weights.by_name.keys(), table, source=imported.source)
    slots = model_slots(imported.model)
    _check_shapes(slots, table, weights, match, imported.source)
    _check_dtypes(table, weights, match, imported.source)
    parameters = list(_parameters(slots, table, weights, match, dtype))
    total = sum(parameter.size for parameter in parameters)
    meter = Meter("import", total, shown=shown)
    carried = weights.size(match.carried)
    with whole_directory(target, size=total + carried + _MARGIN) as root:
        objects = model_objects(imported.model)
        write_parameters(root, parameters, objects, meter, threads=threads)
        imported.write_assets(root / ASSETS)
        carry_weights(weights, match.carried, root / ASSETS, dtype=dtype)
        hash_assets(root / ASSETS)
    notes = [f"imported {imported.family.name}: {len(parameters)} parameters, {meter.end()}"]
    notes += imported.notes
    if match.carried:
        notes.append(
            f"{len(match.carried)} weights ({carried / 1e6:.1f} MB) that the model does without "
            "are kept for the export"
        )
    return "\n".join(notes)


@contextmanager
def meta_model(family: Any, config: Any) -> Iterator[Any]:
    """The whole model on one process, without memory for its parameters."""
    with process_groups():
        # Initialised for the CPU, parameters are made where torch is told: nowhere.
        changes = {"transformer_impl": "local", "use_cpu_initialization": True}
        settings = model_settings(family, config, changes=changes)
        yield build_model(family, config, settings, device=torch.device("meta"))


def write_parameters(
    root: Path,
    parameters: Iterable[Parameter],
    objects: Sequence[ShardedObject],
    meter: Meter,
    *,
    threads: int | None = None,
) -> None:
    """Write a checkpoint with these parameters and objects into the folder ``root``."""
    folder = root / RELEASE
    folder.mkdir()
    count = threads or default_threads()
    ordered = sorted(parameters, key=lambda one: one.order)
    limit = min(_FILE_BYTES, sum(parameter.size for parameter in ordered) // count)
    bins: list[list[Parameter]] = [[]]
    room = limit
    for parameter in ordered:
        if bins[-1] and parameter.size > room:
            bins.append([])
            room = limit
        bins[-1].append(parameter)
        room -= parameter.size

    def write(number: int) -> CheckpointFile:
        file = CheckpointFile(folder, number)
        for parameter in bins[number]:
            for piece in parameter.slot.pieces_of(parameter.make()):
                file.write(piece)
            meter.add(parameter.size)
        file.close()
        return file

    with without_checksums():
        files = in_threads(write, range(len(bins)), threads=count)
    finish_checkpoint(root, files, objects)


def _check_shapes(
    slots: list[Slot], table: KeyTable, weights: WeightSource, match: Match, source: str
) -> None:
    expected: dict[str, tuple[int, ...]] = {}
    for slot, row in match_slots(slots, table):
        expected |= table.hf_shapes(row, slot.shape)
    shapes = {name: weights.by_name[match.given[name]].shape for name in expected}
    check_shapes(expected, shapes, source=source)


def _check_dtypes(table: KeyTable, weights: WeightSource, match: Match, source: str) -> None:
    """Refuse weights that are not numbers as they stand, such as 8-bit ones without their scale."""
    names = [match.given[name] for row in table.each() for name in row.hf]
    wrong = [name for name in names if weights.by_name[name].dtype not in (*FLOATS, torch.float64)]
    if wrong:
        raise InputError(
            f"{source}: {len(wrong)} weights, such as {wrong[0]}, are of "
            f"{weights.by_name[wrong[0]].dtype}; expected floating-point numbers of 16 bits or "
            "more: take the model as it was before it was quantised"
        )


def _parameters(
    slots: list[Slot],
    table: KeyTable,
    weights: WeightSource,
    match: Match,
    dtype: torch.dtype | None,
) -> Iterator[Parameter]:
    for slot, row in match_slots(slots, table):
        names = {name: match.given[name] for name in row.hf}
        first = weights.by_name[names[row.hf[0]]]
        size = weights.size(names.values())
        if dtype is not None and first.dtype in FLOATS:
            size = size // first.dtype.itemsize * dtype.itemsize
        yield Parameter(
            slot=slot,
            size=size,
            order=(first.file, first.start),
            make=_maker(row, names, weights, dtype),
        )


def _maker(
    row: KeyEntry, names: Mapping[str, str], weights: WeightSource, dtype: torch.dtype | None
) -> Callable[[], Tensor]:
    def make() -> Tensor:
        whole = make_parameter(row, {name: weights.read(file) for name, file in names.items()})
        return whole.to(dtype) if dtype is not None and whole.dtype in FLOATS else whole

    return make
