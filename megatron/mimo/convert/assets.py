"""Keeps what a checkpoint needs of a Hugging Face directory besides our model's weights.

The folder ``hf`` beside the weights holds the configuration, the processor's and tokenizer's files
and the like as they were, and two files of this project: the weights that our model does without,
and the files, names and order of all weights, so that an export gives the very files back.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.checkpoints.assets import ASSET_HASHES
from megatron.mimo.convert.weights import (
    FLOATS,
    INDEX_FILE,
    Weights,
    WeightsFile,
    WeightSource,
    is_weights_name,
    make_header,
    weights_of,
)

__all__ = [
    "CARRIED_FILE",
    "NAMES_FILE",
    "NameIndex",
    "carry_weights",
    "check_placeholders",
    "copy_assets",
    "read_name_index",
    "write_name_index",
]

NAMES_FILE = "mimo_weights.json"
CARRIED_FILE = "mimo_carried.safetensors"
# Weights, in this format or another: never copied.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx", ".ckpt")
_OWN = (NAMES_FILE, CARRIED_FILE, INDEX_FILE, ASSET_HASHES)


@dataclass(frozen=True, kw_only=True)
class NameIndex:
    """The files that a model was imported from.

    Attributes:
        headers: file name -> its header.
        index: content of the index file; None where there was one file only.
    """

    headers: dict[str, str]
    index: str | None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every weight, by its name in the files."""
        return {
            weight.name: weight.shape
            for file, header in self.headers.items()
            for weight in weights_of(header, file=file, start=0)
        }


def check_placeholders(
    folder: Path, special_token_ids: Mapping[str, int], *, vocab_size: int | None = None
) -> None:
    """Refuse a tokenizer without the placeholder tokens, or of more tokens than the model has.

    Args:
        folder: a Hugging Face directory; it may have no tokenizer.
        special_token_ids: placeholder token id of each modality, from its configuration.
        vocab_size: rows of the model's embedding; None to leave that alone.

    Raises:
        InputError: one of them is no token of ``tokenizer.json``, this file is damaged, or it
            has tokens that the model has no embedding for.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return
    try:
        content = json.loads(path.read_text())
        vocabulary = content["model"]["vocab"]
        known = {added["id"] for added in content.get("added_tokens", [])}
        known |= set(
            vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
        )
        if not all(isinstance(number, int) for number in known):
            raise ValueError("a token's id is no number")
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not a tokenizer: {error}; fetch it again") from error
    for modality, token in special_token_ids.items():
        if token not in known:
            raise InputError(
                f"{path} has no token {token}, which config.json gives as the placeholder of "
                f"{modality}; add it to the tokenizer (tokenizer.add_tokens(..., "
                "special_tokens=True)) and save it there, or correct config.json"
            )
    beyond = known - set(special_token_ids.values())
    if vocab_size is not None and beyond and max(beyond) >= vocab_size:
        raise InputError(
            f"{path} has tokens up to id {max(beyond)}, and the model {vocab_size} embeddings; "
            f"give it more with model.resize_token_embeddings({max(known) + 1}) of transformers, "
            "save it and import that, or take the tokenizer that it came with"
        )


def copy_assets(source: Path, target: Path) -> None:
    """Copy all files but weights, with folders; neither hidden ones nor those of this project."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            copy_assets(path, target / path.name)
        elif path.name not in _OWN and not path.name.endswith(_WEIGHTS):
            shutil.copyfile(path, target / path.name)


def carry_weights(
    weights: WeightSource,
    names: tuple[str, ...],
    target: Path,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Write weights that our model does without into the folder ``target``, one by one.

    Args:
        weights: all of them.
        names: of those to write.
        target: the folder.
        dtype: of floating-point weights; their own by default.
    """
    if not names:
        return
    kinds = {name: weights.by_name[name].dtype for name in names}
    if dtype is not None:
        kinds |= {name: dtype for name, kind in kinds.items() if kind in FLOATS}
    header = make_header((name, kinds[name], weights.by_name[name].shape) for name in names)
    file = WeightsFile(target / CARRIED_FILE, header)
    for name in names:
        file.write(name, weights.read(name).to(kinds[name]))
    file.close()


def write_name_index(weights: Weights, target: Path) -> None:
    """Keep the names and files of the weights in the folder ``target``."""
    content = {"files": weights.headers, "index": weights.index}
    (target / NAMES_FILE).write_text(json.dumps(content) + "\n")


def read_name_index(assets: Path) -> NameIndex | None:
    """What :func:`write_name_index` wrote; None where a model was not imported.

    Raises:
        InputError: the file is damaged.
    """
    path = assets / NAMES_FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
        headers = dict(content["files"])
        for file, header in headers.items():
            if not is_weights_name(file) or file == CARRIED_FILE:
                raise ValueError(f"it names the file {file!r}, outside of the model's folder")
            weights_of(header, file=file, start=0)
        return NameIndex(headers=headers, index=content["index"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is damaged: {error}; copy it from the imported checkpoint, or remove it to "
            "export under new file names"
        ) from error
