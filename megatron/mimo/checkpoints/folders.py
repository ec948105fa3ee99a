"""Which checkpoint a run may start from, and how many of them stay on disk.

Megatron writes ``iter_0000100/``: first the ``*.distcp`` files, then ``.metadata`` that indexes
them, then ``metadata.json``, and at last the tracker file with the number 100. A run that is
killed leaves any prefix of this; nothing but a directory that passes ``problem`` is ever loaded.
"""

from __future__ import annotations

import os
import pickle
import re
import shutil
import warnings
from argparse import Namespace
from pathlib import Path

from megatron.core.models.mimo.errors import ConfigError
from megatron.mimo.backend import select_backend
from megatron.mimo.backend.pickles import load_index, load_object

__all__ = [
    "ASSETS",
    "RELEASE",
    "TRACKER",
    "checkpoints",
    "choose",
    "newest",
    "problem",
    "prune",
    "saved_arguments",
    "write_text",
]

TRACKER = "latest_checkpointed_iteration.txt"
"""The file that makes a folder one of checkpoints: it names the last."""
ASSETS = "hf"
"""The folder beside the checkpoints with all that a model has besides weights."""
RELEASE = "release"  # in place of an iteration: weights that were imported, without a run's state
_NAME = re.compile(r"iter_(\d{7,})")


def checkpoints(folder: Path) -> dict[int, Path]:
    """The iteration directories of ``folder``, oldest first, complete or not."""
    if not folder.is_dir():
        return {}
    found = {}
    for path in folder.iterdir():
        match = _NAME.fullmatch(path.name)
        if match and path.is_dir():
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def problem(path: Path) -> str | None:
    """What keeps a checkpoint directory from being loaded; None when it is complete.

    Checks that all parts exist with the sizes its index gives, not the bytes in them
    (``--verify-integrity`` does).
    """
    if not path.is_dir():
        return "it does not exist"
    if any(path.glob("mp_rank_0*")):
        return None  # written with --ckpt-format torch, which has no index to check
    if not (path / ".metadata").is_file():
        return "its index (.metadata) is missing: writing it was interrupted"
    if not (path / "metadata.json").is_file():
        return "metadata.json is missing: writing it was interrupted"
    try:
        with (path / ".metadata").open("rb") as file:
            index = load_index(file).storage_data or {}
        needed: dict[str, int] = {}
        for part in index.values():
            end = part.offset + part.length
            needed[part.relative_path] = max(needed.get(part.relative_path, 0), end)
    except Exception as error:  # noqa: BLE001 - a damaged pickle raises anything
        return f"its index (.metadata) cannot be read: {type(error).__name__}: {error}"
    if (path / "common.pt").is_file():  # of older versions of megatron-core
        try:
            with (path / "common.pt").open("rb") as file:
                load_object(file)
        except Exception as error:  # noqa: BLE001 - as above
            reason = str(error).partition(". ")[0].partition("\n")[0]
            return f"common.pt cannot be read: {type(error).__name__}: {reason}"
    for name, size in sorted(needed.items()):
        if not (path / name).is_file():
            return f"{name} is missing"
        actual = (path / name).stat().st_size
        if actual < size:
            return f"{name} has {actual} bytes, expected {size}: it is cut off"
    return None


def choose(args: Namespace, *, repair: bool) -> tuple[int | None, str | None]:
    """Find the checkpoint to start from, in ``args.load``.

    Args:
        args: parsed arguments; ``explicit_load`` says that the user named the directory.
        repair: rewrite the tracker file when it does not name the chosen checkpoint (one rank
            only; the others come to the same answer before and after).

    Returns:
        The iteration (None: start from scratch), and a warning to show or None.

    Raises:
        ConfigError: a directory was named that has no checkpoint, the iteration that was asked
            for is not there or damaged, or all checkpoints are damaged.
    """
    if args.load is None:
        return None, None
    folder = Path(args.load)
    tracked = _read_tracker(folder)
    available = checkpoints(folder)
    if args.ckpt_step and args.pretrained_checkpoint is not None and tracked is None:
        origin = Path(args.pretrained_checkpoint)
        _require(origin, args.ckpt_step, checkpoints(origin))
        return None, None
    if args.ckpt_step:
        _require(folder, args.ckpt_step, available)
        return args.ckpt_step, None
    if tracked == RELEASE:
        trouble = problem(folder / RELEASE)
        if trouble is not None:
            raise ConfigError(
                f"checkpoint {folder}/{RELEASE} is damaged: {trouble}; import the model again"
            )
        return 0, None
    if tracked is None and not available:
        if args.explicit_load and args.pretrained_checkpoint is None:
            raise ConfigError(
                f"--load {folder}: there is no checkpoint; "
                + (_what_else(folder) or "leave --load away to start from scratch, or correct it")
            )
        return None, None
    wanted = int(tracked) if tracked and tracked.isdigit() else None
    if wanted is not None:
        trouble = problem(folder / f"iter_{wanted:07d}")
        if trouble is None:
            return wanted, None
        what = f"checkpoint {folder}/iter_{wanted:07d} is damaged: {trouble}"
    elif tracked is None:
        what = f"{folder}/{TRACKER} is missing"
    else:
        what = f"{folder}/{TRACKER} is damaged: it says {tracked!r}, expected an iteration"
    complete = [
        number for number, path in available.items() if number != wanted and problem(path) is None
    ]
    if wanted is None and tracked is None and not complete:
        return None, f"{folder} holds only unfinished checkpoints; starting from scratch"
    if not complete:
        raise ConfigError(
            f"{what}; no complete checkpoint is left there; "
            f"restore it, or remove {folder} to start from scratch"
        )
    newest = complete[-1]
    if repair:
        write_text(folder / TRACKER, str(newest))
    return newest, f"{what}; using the newest complete one, iteration {newest}"


def _what_else(folder: Path) -> str | None:
    """What a folder without checkpoints is, and the remedy; None where that is not known."""
    if (folder / "config.json").is_file():
        return (
            "it is a Hugging Face model's directory, which has to be imported first: "
            f"python -m megatron.mimo.convert import {folder} CHECKPOINT"
        )
    if (folder / "checkpoints").is_dir():
        return f"it is a run's directory: name {folder / 'checkpoints'}"
    return None


def newest(folder: Path, iteration: int | None = None) -> Path:
    """The directory of the newest complete checkpoint in ``folder``, or of the one asked for.

    Args:
        folder: what ``--save`` or ``convert import`` wrote.
        iteration: another than the newest.

    Raises:
        ConfigError: there is none that can be used.
    """
    available = checkpoints(folder)
    if iteration is not None:
        _require(folder, iteration, available)
        return available[iteration]
    if _read_tracker(folder) == RELEASE:
        return folder / RELEASE
    complete = [path for path in available.values() if problem(path) is None]
    if not complete:
        damaged = f" but {len(available)} damaged ones" if available else ""
        raise ConfigError(
            f"{folder} holds no checkpoint{damaged}; "
            + (
                _what_else(folder)
                or f"expected a directory with {TRACKER}, as --save and convert import write it"
            )
        )
    return complete[-1]


def saved_arguments(checkpoint: Path) -> Namespace | None:
    """The arguments of the run that wrote a checkpoint; None for one that no run wrote.

    Args:
        checkpoint: one iteration's directory.
    """
    from torch.distributed.checkpoint import CheckpointException

    from megatron.core.dist_checkpointing import load_common_state_dict

    if not (checkpoint / "metadata.json").is_file():
        return _saved_with_torch(checkpoint)
    select_backend()  # which lets torch unpickle what a checkpoint is made of, and no more
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no process group: none is needed
        try:
            args: Namespace | None = load_common_state_dict(str(checkpoint)).get("args")
        except (pickle.UnpicklingError, CheckpointException) as error:
            raise ConfigError(
                f"checkpoint {checkpoint} cannot be used: what it holds beside tensors cannot be "
                f"read: {_last_line(error)}; choose another one"
            ) from error
    return args


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _saved_with_torch(checkpoint: Path) -> Namespace | None:
    """The arguments in a checkpoint of ``--ckpt-format torch``; tensors are not read."""
    import torch

    from megatron.core.safe_globals import register_safe_globals

    file = next(iter(sorted(checkpoint.glob("mp_rank_0*/model_optim_rng.pt"))), None)
    if file is None:
        return None
    register_safe_globals()
    try:
        content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:
        raise ConfigError(
            f"checkpoint {checkpoint} is damaged: {file.name} cannot be read: "
            f"{type(error).__name__}; choose another one with --ckpt-step, or another --output"
        ) from error
    args: Namespace | None = content.get("args")
    return args


def prune(folder: Path, *, keep: int, retain_interval: int | None) -> None:
    """Remove the oldest checkpoints but ``keep``, never the one that the tracker names.

    Args:
        folder: the ``--save`` directory.
        keep: how many of the newest stay; 0 keeps all.
        retain_interval: ``--save-retain-interval``: multiples of it stay as well.
    """
    tracked = _read_tracker(folder)
    if keep == 0 or tracked is None or not tracked.isdigit():
        return
    done = {number: path for number, path in checkpoints(folder).items() if number <= int(tracked)}
    for number in list(done)[:-keep]:
        retained = retain_interval is not None and number % retain_interval == 0
        if not retained and not done[number].is_symlink():
            shutil.rmtree(done[number], ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Replace a file's content as a whole: readers see the old text or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".new")
    with fresh.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


def _read_tracker(folder: Path) -> str | None:
    try:
        return (folder / TRACKER).read_text(errors="replace").strip()
    except FileNotFoundError:
        return None


def _require(folder: Path, step: int, available: dict[int, Path]) -> None:
    path = folder / f"iter_{step:07d}"
    trouble = problem(path)
    if trouble is not None:
        raise ConfigError(
            f"iteration {step} was asked for: checkpoint {path} cannot be used: {trouble}; "
            f"available: {', '.join(map(str, available)) or 'none'}"
        )
