"""Adapters in the format of the library PEFT, for a model in Hugging Face's format.

Legend: O output features, I input features, R rank.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.lora.merge import adapter_names, is_adapter, weight_name
from megatron.mimo.lora.settings import LoraSettings
from megatron.mimo.models.common.keys import KeyTable

__all__ = ["export_adapters", "module_names", "peft_tensors"]

_PREFIX = "base_model.model."


def export_adapters(
    table: KeyTable,
    tensors: Mapping[str, Tensor],
    settings: LoraSettings,
    folder: Path,
    *,
    names: Mapping[str, str],
    trained: Mapping[str, Tensor] | None = None,
    base_model: str | None = None,
) -> list[str]:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``.

    Args:
        table: of the model's family.
        tensors: whole (not sharded) parameters by the names of ``Row.mimo``; those that are not
            adapters are left alone.
        settings: what the adapters were made with.
        folder: exists; files of these names are replaced.
        names: as ``module_names`` gives them.
        trained: whole parameters that were trained without adapters, by the same names: PEFT's
            ``modules_to_save``.
        base_model: what PEFT calls the model that the adapters belong to: a directory or name.

    Returns:
        Trained weights, by their names in the module tree, that PEFT's format has no place for: it
        saves whole modules, and these belong to one that has others within.

    Raises:
        InputError: no adapter, or one of a weight that Hugging Face's format does not have.
    """
    from safetensors.torch import save_file

    found = peft_tensors(table, tensors, names)
    if not found:
        raise InputError("there are no adapters to export; train with --lora, or export the model")
    whole, left_out = _whole_modules(table, trained or {}, names)
    save_file(
        {name: tensor.contiguous().clone() for name, tensor in (found | whole).items()},
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    modules = sorted({name.removeprefix(_PREFIX).rpartition(".lora_")[0] for name in found})
    saved = sorted({name.removeprefix(_PREFIX).rpartition(".")[0] for name in whole})
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_model,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "target_modules": modules,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": saved or None,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return left_out


def _whole_modules(
    table: KeyTable, trained: Mapping[str, Tensor], names: Mapping[str, str]
) -> tuple[dict[str, Tensor], list[str]]:
    """PEFT's tensors of trained parameters, and the names of those that it cannot save."""
    rows = {row.mimo: row for row in table.each()}
    parents = {name.rpartition(".")[0] for name in names.values()}
    found, left_out = {}, []
    for parameter, tensor in trained.items():
        row = rows[parameter]
        for hf, part in zip(row.hf, row.transform.to_hf(tensor), strict=True):
            name = names[hf]
            module = name.rpartition(".")[0]
            if any(parent.startswith(f"{module}.") for parent in parents):
                left_out.append(name)
            else:
                found[_PREFIX + name] = part
    for copy, origin in table.tied:  # PEFT gives each module a weight of its own
        if origin in names and _PREFIX + names[origin] in found and copy in names:
            found[_PREFIX + names[copy]] = found[_PREFIX + names[origin]]
    return found, left_out


def module_names(reference: Any) -> dict[str, str]:
    """What the parameters are called in the model that transformers builds: PEFT asks for these.

    They are not always the names that transformers writes into files. Which becomes which is seen
    by writing a file, with numbers in the place of the parameters.

    Args:
        reference: Hugging Face's model (a ``PreTrainedModel``); on "meta" it takes no memory.

    Returns:
        Name in files -> name in the module tree.
    """
    from safetensors.torch import load_file

    names = list(reference.state_dict())
    with (
        torch.device("cpu"),  # the caller may be making tensors on another
        tempfile.TemporaryDirectory() as folder,
        _no_progress_bars(),
    ):
        # Of a stack of experts one number for each, twice: writing may split it.
        stacks = {
            name: one.size(0) for name, one in reference.state_dict().items() if one.dim() == 3
        }
        numbers = {
            name: torch.full((stacks[name], 2, 2) if name in stacks else (1,), float(number))
            for number, name in enumerate(names)
        }
        reference.save_pretrained(folder, state_dict=numbers)
        written = load_file(Path(folder) / "model.safetensors")
    return {name: names[int(number.flatten()[0])] for name, number in written.items()}


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    from transformers.utils import logging

    was_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_shown:
            logging.enable_progress_bar()


def peft_tensors(
    table: KeyTable, tensors: Mapping[str, Tensor], names: Mapping[str, str]
) -> dict[str, Tensor]:
    """PEFT's tensors: ``lora_A`` [R, I] and ``lora_B`` [O, R] of every Hugging Face weight.

    A weight of ours that is several of Hugging Face's (queries, keys and values; gate and up) has
    one ``down``, which all of them share, and an ``up`` whose rows split as the weight's do: the
    result is the same function, exactly.
    """
    rows = {row.mimo: row for row in table.each()}
    weights = dict.fromkeys(weight_name(name) for name in tensors if is_adapter(name))
    result = {}
    for weight in weights:
        if weight not in rows:
            raise InputError(
                f"the adapter of {weight} cannot be exported: the family's table has no such "
                "parameter, so Hugging Face's model has none"
            )
        row, (down, up) = rows[weight], adapter_names(weight)
        for hf, part_OR in zip(row.hf, row.transform.to_hf(tensors[up]), strict=True):
            module = _PREFIX + names[hf].removesuffix(".weight")
            result[f"{module}.lora_A.weight"] = tensors[down]
            result[f"{module}.lora_B.weight"] = part_OR
    return result
