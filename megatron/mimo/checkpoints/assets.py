"""The folder ``hf`` of a checkpoint: configuration, processor, tokenizer, generation settings."""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron.core.models.mimo.errors import ConfigError
from megatron.mimo.checkpoints.folders import ASSETS
from megatron.mimo.checkpoints.hashes import (
    FileHash,
    ManifestError,
    first_change,
    hash_files,
    list_files,
    read_manifest,
    write_manifest,
)
from megatron.mimo.checkpoints.tracker import holds_checkpoint
from megatron.mimo.models import read_hf_config
from megatron.mimo.models.common.folder import check_links

__all__ = [
    "ASSET_HASHES",
    "CONFIG",
    "PROCESSOR",
    "asset_folders",
    "changed_asset",
    "end_tokens",
    "hash_assets",
    "loaded_assets",
    "read_processor",
    "write_assets",
]

CONFIG, PROCESSOR = "config.json", "*processor_config.json"
ASSET_HASHES = "mimo_hashes.json"
_WEIGHTS = ".safetensors"
GENERATION = "generation_config.json"


def hash_assets(folder: Path, *names: str) -> None:
    """Write hashes of what a folder ``hf`` holds beside it.

    Args:
        folder: it is whole.
        names: of files that were changed: only their hashes are renewed, where there are some.
    """
    known: dict[str, FileHash] = {}
    if names:
        with suppress(ManifestError):
            known = read_manifest(folder, manifest=ASSET_HASHES) or {}
        if not known:
            return
    found = hash_files(folder, names or list_files(folder, manifest=ASSET_HASHES))
    write_manifest(folder, known | found, manifest=ASSET_HASHES)


def changed_asset(folder: Path, *, weights: bool = False) -> str | None:
    """What has changed in a folder ``hf`` since it was written, to be said; None where nothing has.

    People may change these files; disks should not.

    Args:
        folder: with hashes, or without (an older one): then nothing is known to have changed.
        weights: the weights that lie in it, or all that does not hold weights.
    """
    try:
        known = read_manifest(folder, manifest=ASSET_HASHES) or {}
        chosen = {name: one for name, one in known.items() if name.endswith(_WEIGHTS) == weights}
        change = first_change(folder, chosen) or first_change(folder, chosen, list(chosen))
    except ManifestError as error:
        change = str(error)
    if change is None:
        return None
    return (
        f"{folder}/{change}; restore it or, if it was changed on purpose, remove "
        f"{folder / ASSET_HASHES}"
    )


def read_processor(folder: Path) -> Any:
    """The processor of a Hugging Face directory, or of a checkpoint's ``hf`` folder.

    Raises:
        ConfigError: transformers is not installed, or the folder has no processor that it reads.
    """
    if (folder / "config.json").is_file():
        read_hf_config(folder)  # a family that transformers does not have registers its classes
    check_links(folder)
    try:
        from transformers import AutoProcessor

        return AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever is missing or damaged in it
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigError(
            f"{folder} has no processor that can be read: {reason}; copy the processor's and the "
            "tokenizer's files of the model there, or name their folder with --hf"
        ) from error


def end_tokens(folder: Path) -> tuple[int, ...]:
    """Ids that end an answer: of generation_config.json, or where there is none, config.json.

    Raises:
        ConfigError: the file is damaged.
    """
    file = next((folder / name for name in (GENERATION, CONFIG) if (folder / name).is_file()), None)
    if file is None:
        return ()
    try:
        content = json.loads(file.read_text())
        given = content.get("eos_token_id")
        if given is None and file.name == CONFIG:
            given = content.get("text_config", {}).get("eos_token_id")
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"{file} is not JSON of an object: {error}; repair it") from error
    tokens = given if isinstance(given, list) else [given]
    return tuple(token for token in tokens if isinstance(token, int))


def loaded_assets(args: Namespace) -> Path | None:
    """The ``hf`` folder of the checkpoint that the run begins from, if it has one."""
    for root in (args.load, args.pretrained_checkpoint):
        if root is not None and holds_checkpoint(Path(root)):
            folder = Path(root) / ASSETS
            return folder if (folder / "config.json").is_file() else None
    return None


def asset_folders(args: Namespace, file: str) -> list[Path]:
    """Folders with files of this name (a pattern): the checkpoint's, that of ``--hf``.

    Raises:
        ConfigError: ``--hf`` names no folder.
    """
    if args.hf and not Path(args.hf).is_dir():
        raise ConfigError(f"--hf {args.hf}: there is no such folder; correct the path")
    folders = (loaded_assets(args), Path(args.hf) if args.hf else None)
    return [folder for folder in folders if folder and any(folder.glob(file))]


def write_assets(target: Path, config: Any, processor: Any, hf: str | None) -> None:
    """Write what a checkpoint needs besides weights into a new folder.

    Args:
        target: the folder.
        config: Hugging Face configuration.
        processor: Hugging Face processor.
        hf: folder of ``--hf``, whose generation settings are taken if it has some.
    """
    from transformers import GenerationConfig

    target.mkdir(parents=True)
    config.save_pretrained(target)
    processor.save_pretrained(target)
    given = Path(hf) / GENERATION if hf else None
    if given is not None and given.is_file():
        shutil.copy(given, target)
        return
    generation = GenerationConfig.from_model_config(config)
    generation.eos_token_id = processor.tokenizer.eos_token_id
    generation.save_pretrained(target)
