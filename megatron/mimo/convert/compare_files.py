"""Compares a checkpoint with a Hugging Face directory: weights and configuration."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron.mimo.checkpoints.folders import ASSETS
from megatron.mimo.checkpoints.match import match_names
from megatron.mimo.checkpoints.slots import match_slots, model_slots
from megatron.mimo.checkpoints.torch_dist import CheckpointReader
from megatron.mimo.convert.assets import CARRIED_FILE
from megatron.mimo.convert.differences import told
from megatron.mimo.convert.exporting import read_parameter
from megatron.mimo.convert.importing import meta_model
from megatron.mimo.convert.stacked import unstacked
from megatron.mimo.convert.threads import in_threads
from megatron.mimo.convert.weights import (
    Weights,
    WeightSource,
    read_header,
    read_tensor,
    weights_of,
)
from megatron.mimo.lora.settings import saved_settings

__all__ = ["SHOWN", "Finding", "compare_config", "compare_weights"]

SHOWN = 8
# What a configuration says of who wrote it; dtypes are compared weight by weight.
_OF_THE_WRITER = ("transformers_version", "_name_or_path", "dtype", "torch_dtype")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report.

    Attributes:
        title: what was compared.
        text: what came out.
        equal: whether it is as it should be.
        rows: the worst cases, as lines of a table.
    """

    title: str
    text: str
    equal: bool
    rows: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{'ok  ' if self.equal else 'FAIL'}  {self.title:<10}  {self.text}"]
        return "\n".join([*lines, *(f"        {row}" for row in self.rows)])


def compare_config(theirs: Any, ours: Any) -> Finding:
    """Every field of two configurations, those of their parts and unknown ones included.

    Args:
        theirs: of the directory.
        ours: of the checkpoint's folder ``hf``, which training, generation and export read.
    """
    fields, others = (dict(_fields(config.to_dict(), "")) for config in (theirs, ours))
    nothing = object()
    rows = [
        f"{name}: {fields.get(name, 'missing')!r} / {others.get(name, 'missing')!r}"
        for name in {**fields, **others}
        if fields.get(name, nothing) != others.get(name, nothing)
    ]
    return Finding(
        title="config",
        text=f"{len(fields) - len(rows)} of {len(fields)} fields of config.json and "
        f"{ASSETS}/config.json are equal",
        equal=not rows,
        rows=tuple(rows[:SHOWN]),
    )


def _fields(part: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in part.items():
        if name in _OF_THE_WRITER:
            continue
        if isinstance(value, dict):
            yield from _fields(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", list(value) if isinstance(value, tuple) else value


def compare_weights(family: Any, config: Any, source: Path, folder: Path) -> list[Finding]:
    """Names, and every bit, those of weights that our model does without included.

    Args:
        family: the model's.
        config: its configuration.
        source: the directory.
        folder: ``iter_...`` or ``release`` of the checkpoint.
    """
    reader = CheckpointReader(folder)
    weights, table = unstacked(Weights(source), family.keys(config))
    match = match_names(weights.by_name.keys(), table, source=str(source))
    with meta_model(family, config) as model:
        pairs = list(match_slots(model_slots(model), table))
    settings = saved_settings(folder)

    def compare(pair: Any) -> list[tuple[float, str]]:
        slot, row = pair
        ours = row.transform.to_hf(read_parameter(reader, slot, settings))
        return [
            _compare_tensors(name, weights.read(match.given[name]), part)
            for name, part in zip(row.hf, ours, strict=True)
        ]

    lines = [line for lines in in_threads(compare, pairs, threads=None) for line in lines]
    count = len(lines)
    lines += _compare_carried(weights, match.carried, folder.parent / ASSETS / CARRIED_FILE)
    wrong = [text for worst, text in sorted(lines, reverse=True) if worst]
    text = f"{len(lines) - len(wrong)} of {len(lines)} weights equal in shape, dtype and every bit"
    if match.carried:
        text += f"; {len(lines) - count} of them are not part of the model"
    keys = f"{len(match.given)} Hugging Face weights <-> {len(pairs)} parameters"
    return [
        Finding(title="keys", text=keys, equal=True),
        Finding(title="weights", text=text, equal=not wrong, rows=tuple(wrong[:SHOWN])),
    ]


def _compare_carried(
    weights: WeightSource, names: tuple[str, ...], path: Path
) -> Iterator[tuple[float, str]]:
    """Weights that our model does without, against those that the checkpoint keeps."""
    kept: set[str] = set()
    if path.is_file():
        header, start = read_header(path)
        kept = {weight.name for weight in weights_of(header, file=path.name, start=start)}
    for name in sorted(kept | set(names)):
        if name in kept and name in weights.by_name:
            yield _compare_tensors(name, weights.read(name), read_tensor(path, name))
        else:
            where = path.name if name in kept else "the directory"
            yield float("inf"), f"{name}: only in {where}"


def _compare_tensors(name: str, theirs: torch.Tensor, ours: torch.Tensor) -> tuple[float, str]:
    """The size of the difference (0: equal), and a description."""
    if theirs.shape != ours.shape:
        return float("inf"), f"{name}: shape {list(theirs.shape)} / {list(ours.shape)}"
    difference = (theirs.double() - ours.double()).abs().max().item() if theirs.numel() else 0.0
    if theirs.dtype != ours.dtype:
        return difference or 1e-30, f"{name}: {theirs.dtype} / {ours.dtype}, max {difference:.2e}"
    if torch.equal(_bits(theirs), _bits(ours)):
        return 0.0, name
    how = told(theirs, ours)
    words = f"{name}: largest difference {difference:.2e}" + (f"; {how}" if how else "")
    return difference or 1e-30, words


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, by which -0.0 differs from 0.0 and a NaN equals itself."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)
