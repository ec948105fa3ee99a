"""Tiny models on disk, for functions that run in the rank pool."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def make_model(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Write a tiny Hugging Face model in several files; returns it."""
    from megatron.mimo.models import load_family

    family = load_family(name)
    torch.manual_seed(5)
    model: Any = family.reference(family.tiny()).to(dtype)
    size = sum(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(folder, max_shard_size=size // 3)
    return model


def make_and_import(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> str:
    """``folder``/hf and ``folder``/mimo."""
    from megatron.mimo.convert.importing import import_model

    make_model(name, folder / "hf", dtype)
    return import_model(folder / "hf", folder / "mimo", shown=False)


def same_files(one: Path, other: Path) -> bool:
    """Whether two folders hold the same files, byte for byte."""
    contents = [
        {path.name: path.read_bytes() for path in folder.iterdir()} for folder in (one, other)
    ]
    return contents[0] == contents[1]
