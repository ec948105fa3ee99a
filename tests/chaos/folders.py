"""Malformed Hugging Face folders, imported as a user imports them."""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

from tests.chaos.fuzz import Case, disturb, scramble

__all__ = ["folders"]

_FAMILIES = ("llava", "qwen2_audio", "qwen2_5_vl")
_IMPORTED = 0.05  # of the folders that can be read, for it takes long


def _read(source: Path) -> None:
    """What an import reads of a folder before it builds and writes anything."""
    from megatron.mimo.convert.assets import check_placeholders
    from megatron.mimo.convert.ties import config_of_files
    from megatron.mimo.convert.weights import Weights
    from megatron.mimo.models import family_of, read_hf_config

    config = read_hf_config(source)
    family = family_of(config)
    vocab_size = config.get_text_config().vocab_size
    check_placeholders(source, family.media(config).special_token_ids, vocab_size=vocab_size)
    weights = Weights(source)
    config_of_files(family, config, weights, source=str(source))
    for name in list(weights.by_name)[:3]:
        weights.read(name)


def _write_models(root: Path) -> list[Path]:
    """Tiny models with random weights and processors, as ``save_pretrained`` leaves them."""
    import torch

    from megatron.mimo.models import load_family
    from megatron.mimo.models.common.family import transformers_model
    from megatron.mimo.recipes.tiny import processors

    written = []
    for name in _FAMILIES:
        torch.manual_seed(0)
        config = load_family(name).tiny()
        folder = root / name
        transformers_model(config).save_pretrained(folder)
        getattr(processors, f"{name}_processor")(config).save_pretrained(folder)
        written.append(folder)
    return written


def _break_json(path: Path, random: Random) -> None:
    content = json.loads(path.read_text())
    for _ in range(random.choice([1, 1, 2, 3])):
        content = disturb(content, random)
    path.write_text(json.dumps(content))


def _break_header(path: Path, random: Random) -> None:
    """Change the header of a safetensors file, and say its right length."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    content = json.loads(data[8 : 8 + size])
    name = random.choice(list(content))
    content[name] = disturb(content[name], random)
    if random.random() < 0.3:
        content[random.choice(["", "..", "a/b", name + ".x"])] = content[name]
    header = json.dumps(content).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + size :])


def _replace(path: Path, random: Random) -> None:
    """Put something else, or nothing, in the place of a file."""
    path.unlink()
    what = random.randrange(5)
    if what == 0:
        os.mkfifo(path)
    elif what == 1:
        path.mkdir()
    elif what == 2:
        path.symlink_to("/etc/passwd")
    elif what == 3:
        path.symlink_to(path)


@contextmanager
def folders() -> Iterator[Case]:
    """Cases: an import of a tiny model, one file of which is wrong."""
    from transformers.utils import logging

    from megatron.mimo.backend import select_backend
    from megatron.mimo.convert.importing import import_model

    logging.set_verbosity_error()
    select_backend("cpu")
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        models = _write_models(root)

        def case(random: Random) -> None:
            source, target = root / "source", root / "target"
            shutil.copytree(random.choice(models), source)
            try:
                path = random.choice(sorted(source.iterdir()))
                what = random.random()
                if random.random() < 0.4:
                    path = source / "config.json"
                if what < 0.08:
                    _replace(path, random)
                elif path.suffix == ".safetensors" and what < 0.7:
                    _break_header(path, random)
                elif path.suffix == ".json" and what < 0.8:
                    _break_json(path, random)
                else:
                    path.write_bytes(scramble(path.read_bytes(), random))
                _read(source)
                if random.random() < _IMPORTED:
                    import_model(source, target, threads=1, shown=False)
            finally:
                shutil.rmtree(source, ignore_errors=True)
                shutil.rmtree(target, ignore_errors=True)

        yield case
