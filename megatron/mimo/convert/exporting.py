"""Checkpoint -> Hugging Face directory, streamed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.core.models.mimo.errors import ConfigError, InputError
from megatron.mimo.checkpoints.folders import ASSETS
from megatron.mimo.checkpoints.inspection import Inspector
from megatron.mimo.checkpoints.slots import Slot, match_slots, model_slots
from megatron.mimo.checkpoints.torch_dist import CheckpointReader, locate
from megatron.mimo.convert.assets import CARRIED_FILE, copy_assets, read_name_index
from megatron.mimo.convert.importing import meta_model
from megatron.mimo.convert.meter import Meter
from megatron.mimo.convert.output import Kind, Sink, data_size, plan_output
from megatron.mimo.convert.staging import check_target, whole_directory
from megatron.mimo.convert.threads import default_threads, in_threads
from megatron.mimo.convert.weights import (
    FLOATS,
    INDEX_FILE,
    read_header,
    read_tensor,
    weights_of,
)
from megatron.mimo.lora.merge import adapter_names, merge_adapter
from megatron.mimo.lora.peft import export_adapters, module_names
from megatron.mimo.lora.settings import LoraSettings, frozen_parts, saved_settings
from megatron.mimo.models import family_of, read_hf_config
from megatron.mimo.models.common.keys import KeyEntry, KeyTable

__all__ = ["DEFAULT_SHARD_SIZE", "export_model", "read_parameter"]

DEFAULT_SHARD_SIZE = 5 * 10**9
_MARGIN = 64 * 2**20


def export_model(
    checkpoint: Path,
    target: Path,
    *,
    iteration: int | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int = DEFAULT_SHARD_SIZE,
    adapters_only: bool = False,
    hashes: bool = True,
    threads: int | None = None,
    shown: bool = True,
) -> str:
    """Write a directory that transformers loads, from a checkpoint of any layout.

    Files, names and order of the weights are those of the import, where the checkpoint goes back to
    one; adapters are merged. In memory are, for each thread, one parameter and its Hugging Face
    weights.

    Args:
        checkpoint: root of an imported or trained checkpoint, or one of its iterations.
        target: a new directory.
        iteration: another than the newest.
        dtype: of floating-point weights; those of the checkpoint by default.
        max_shard_size: bytes of a file, where the files of an import are not known.
        adapters_only: write the adapters in PEFT's format, and nothing else.
        hashes: compare the checkpoint's files with the hashes that were written with them.
        threads: that read and write; as many as there are processors, at most 4, by default.
        shown: draw a progress bar on a terminal.

    Returns:
        What was done, for a human.

    Raises:
        ConfigError, UnsupportedError, InputError: see docs/conversion.md; nothing is left behind.
    """
    check_target(target)
    root, folder = locate(checkpoint, iteration=iteration, inspector=Inspector(hashes=hashes))
    assets = root / ASSETS
    config = read_hf_config(assets)
    family = family_of(config)
    known = read_name_index(assets)
    table = family.keys(config).fitting({} if known is None else known.shapes())
    reader = CheckpointReader(folder)
    settings = saved_settings(folder)
    if adapters_only:
        return _export_adapters(reader, table, settings, target, family, config)
    with meta_model(family, config) as model:
        pairs = list(match_slots(model_slots(model), table))
        kinds = _kinds(pairs, table, reader, dtype)
        carried = _carried_kinds(assets, dtype)
        output = plan_output(table, kinds | carried, known, max_shard_size)
        size = sum(len(header) + data_size(header) for header in output.headers.values())
        meter = Meter("export", size, shown=shown)
        with whole_directory(target, size=size + _MARGIN) as out:
            copy_assets(assets, out)
            if dtype is not None or known is None or output.headers != known.headers:
                _set_dtype(out / "config.json", dtype or _prevailing(kinds))
            if output.index is not None:
                (out / INDEX_FILE).write_text(output.index)
            sink = Sink(out, output, meter)

            def convert(pair: tuple[Slot, KeyEntry]) -> None:
                slot, row = pair
                whole = read_parameter(reader, slot, settings)
                for name, part in zip(row.hf, row.transform.to_hf(whole), strict=True):
                    sink.write(name, part)

            count = threads or default_threads()
            in_threads(convert, sink.in_turn(pairs, _first_name, threads=count), threads=count)
            for name in carried:
                sink.write(name, read_tensor(assets / CARRIED_FILE, name))
            assert sink.is_complete, "every weight of the files comes from a row, or is carried"
    merged = "" if settings is None else ", adapters merged"
    source = f"{folder.parent.name}/{folder.name}"
    return f"exported {family.name} ({source}{merged}): {meter.end()}"


def read_parameter(reader: CheckpointReader, slot: Slot, settings: LoraSettings | None) -> Tensor:
    """A whole parameter of a checkpoint, with its adapter merged where it has one.

    Raises:
        InputError: the checkpoint does not have it, or in another shape.
    """
    whole = _read(reader, slot.key, slot, padded=slot.may_be_padded, shape=slot.shape)
    down, up = adapter_names(slot.key)
    if settings is None or down not in reader:
        return whole
    down_RI = _read(reader, down, slot)
    return merge_adapter(whole, down_RI, _read(reader, up, slot), settings.scale)


def _read(
    reader: CheckpointReader,
    key: str,
    slot: Slot,
    *,
    padded: bool = False,
    shape: tuple[int, ...] | None = None,
) -> Tensor:
    """One layer of a global tensor, without the axes that were added for layers."""
    piece = slot.pieces()[0]
    added, saved = piece.prepend_axis_num, reader.shape(key)
    sizes = saved[added:]
    expected = piece.global_shape[:added]
    fits = saved[:added] == expected and (
        shape is None or sizes == shape or (padded and sizes[1:] == shape[1:])
    )
    if not fits:
        raise InputError(
            f"{reader.folder}: {key} has the shape {list(saved)}, expected "
            f"{[*expected, *(shape or ())]} by {ASSETS}/config.json: they are not of one model"
        )
    start = (*piece.global_offset[:added], *(0 for _ in sizes))
    return reader.read(key, start, (*(1 for _ in range(added)), *sizes)).view(sizes)


def _first_name(pair: tuple[Slot, KeyEntry]) -> str:
    return pair[1].hf[0]


def _kinds(
    pairs: list[tuple[Slot, KeyEntry]],
    table: KeyTable,
    reader: CheckpointReader,
    dtype: torch.dtype | None,
) -> dict[str, Kind]:
    """Dtype and shape of every Hugging Face weight, by canonical name, in the table's order."""
    kinds: dict[str, Kind] = {}
    for slot, row in pairs:
        saved = reader.dtype(slot.key)
        for name, shape in table.hf_shapes(row, slot.shape).items():
            kinds[name] = (_converted(saved, dtype), shape)
    return kinds


def _carried_kinds(assets: Path, dtype: torch.dtype | None) -> dict[str, Kind]:
    path = assets / CARRIED_FILE
    if not path.is_file():
        return {}
    header, start = read_header(path)
    return {
        weight.name: (_converted(weight.dtype, dtype), weight.shape)
        for weight in weights_of(header, file=path.name, start=start)
    }


def _converted(dtype: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    return dtype if wanted is None or dtype not in FLOATS else wanted


def _prevailing(kinds: Mapping[str, Kind]) -> torch.dtype:
    """The dtype that most numbers have."""
    counts: Counter[torch.dtype] = Counter()
    for dtype, shape in kinds.values():
        counts[dtype] += torch.Size(shape).numel()
    return counts.most_common(1)[0][0]


def _set_dtype(path: Path, dtype: torch.dtype) -> None:
    """Say the new dtype in a config.json, in all of its parts."""

    def replace(part: Any) -> None:
        for name, value in part.items():
            if name in ("dtype", "torch_dtype") and isinstance(value, str):
                part[name] = str(dtype).removeprefix("torch.")
            elif isinstance(value, dict):
                replace(value)

    content = json.loads(path.read_text())
    replace(content)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _export_adapters(
    reader: CheckpointReader,
    table: KeyTable,
    settings: LoraSettings | None,
    target: Path,
    family: Any,
    config: Any,
) -> str:
    if settings is None:
        raise ConfigError(
            f"{reader.folder} has no adapters: it was not trained with --lora; export the model "
            "without --adapters-only"
        )
    tensors, trained = {}, {}
    with meta_model(family, config) as model:
        model.freeze(*frozen_parts(reader.folder), *settings.modules)
        learns = {name for name, weight in model.named_parameters() if weight.requires_grad}
        for slot, row in match_slots(model_slots(model), table):
            if slot.name in learns:
                trained[slot.name] = read_parameter(reader, slot, None)
            for key, name in zip(adapter_names(slot.key), adapter_names(row.mimo), strict=True):
                if key in reader:
                    tensors[name] = _read(reader, key, slot)
    size = sum(tensor.nbytes for tensor in (*tensors.values(), *trained.values()))
    with whole_directory(target, size=size + _MARGIN) as out:
        with torch.device("meta"):
            names = module_names(family.reference(config))
        left_out = export_adapters(table, tensors, settings, out, names=names, trained=trained)
    notes = [f"exported {len(tensors) // 2} adapters of {family.name}"]
    if trained:
        notes.append(f"{len(trained)} other parameters were trained; whole modules have gone along")
    if left_out:
        notes.append(
            f"left out, as PEFT has no place for them: {', '.join(left_out)}; export without "
            "--adapters-only to keep what they have learned"
        )
    return "\n".join(notes)
