"""Which checkpoint a run may start from, and how many of them stay on disk."""

from __future__ import annotations

import os
import shutil
import warnings
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from megatron.core.models.mimo.errors import ConfigError
from megatron.mimo.backend import select_backend
from megatron.mimo.checkpoints.hashes import MANIFEST
from megatron.mimo.checkpoints.inspection import FORMAT, Inspector, problem
from megatron.mimo.checkpoints.tracker import (
    RELEASE,
    TRACKER,
    Tracker,
    iteration_name,
    iterations,
)

__all__ = [
    "ASSETS",
    "RELEASE",
    "TRACKER",
    "checkpoints",
    "choose",
    "newest",
    "no_checkpoint",
    "problem",
    "prune",
    "require_whole",
    "saved_arguments",
    "settle",
    "write_text",
]

ASSETS = "hf"
"""The folder beside the checkpoints with all that a model has besides weights."""


def checkpoints(folder: Path) -> dict[int, Path]:
    """The iteration directories of ``folder``, oldest first, complete or not."""
    return {number: folder / iteration_name(number) for number in iterations(folder)}


@dataclass(frozen=True, kw_only=True)
class _Root:
    """A folder of checkpoints as rank 0 sees it.

    Attributes:
        folder: what ``--load`` names.
        tracker: what stands in its tracker file.
        numbers: of its iterations, oldest first.
        has_release: whether there is a folder ``release``.
    """

    folder: Path
    tracker: Tracker
    numbers: tuple[int, ...]
    has_release: bool

    @classmethod
    def read(cls, folder: Path, inspector: Inspector) -> _Root:
        tracker = Tracker.read(folder)
        try:
            found = iterations(folder), (folder / RELEASE).is_dir()
        except OSError as error:
            raise ConfigError(f"{folder} cannot be read: {error.strerror}; mend that") from error
        seen = (tracker.name, tracker.trouble, *found)
        name, trouble, numbers, has_release = inspector.ranks.gather(seen)[0]
        tracker = Tracker(name=name, trouble=trouble)
        return cls(folder=folder, tracker=tracker, numbers=tuple(numbers), has_release=has_release)

    @property
    def is_empty(self) -> bool:
        nothing = self.tracker.name is None and self.tracker.trouble is None
        return nothing and not self.numbers and not self.has_release

    def path(self, name: str) -> Path:
        return self.folder / (RELEASE if name == RELEASE else iteration_name(int(name)))

    def names(self) -> list[str]:
        """All that may be loaded: what the tracker says, then from the newest to the oldest."""
        others = [str(number) for number in reversed(self.numbers)]
        first = [self.tracker.name] if self.tracker.name is not None else []
        return list(dict.fromkeys([*first, *others, *([RELEASE] if self.has_release else [])]))


def settle(folder: Path, *, repair: bool, inspector: Inspector) -> tuple[str | None, str | None]:
    """Find the newest checkpoint in ``folder`` that is whole; its tracker file names it then.

    Args:
        folder: a root.
        repair: rewrite the tracker file when it does not name that checkpoint (one rank only).
        inspector: of all ranks.

    Returns:
        "release", a number, or None where there is nothing to load; and a warning or None.

    Raises:
        ConfigError: all checkpoints are damaged, or the tracker file cannot be written.
    """
    root = _Root.read(folder, inspector)
    if root.is_empty:
        return None, None
    found, said = _first_whole(root, inspector)
    if found is None:
        tracked = root.tracker.name is not None or root.tracker.trouble is not None
        ends = (root.path(name) / end for name in root.names() for end in (FORMAT, MANIFEST))
        finished = any(map(os.path.lexists, ends))
        if not tracked and not any(inspector.ranks.gather(finished)):
            return None, f"{folder} holds only unfinished checkpoints; starting from scratch"
        raise ConfigError(
            f"{said}; no complete checkpoint is left there; restore it, or remove {folder} to "
            "start from scratch"
        )
    if found == root.tracker.name:
        return found, said or None
    _put_right(folder, found, repair=repair, inspector=inspector)
    what = "the imported weights" if found == RELEASE else f"iteration {found}"
    return found, "; ".join([said, f"using the newest complete one, {what}"])


def _first_whole(root: _Root, inspector: Inspector) -> tuple[str | None, str]:
    """The first checkpoint that can be loaded, and what is wrong with those before it."""
    said = []
    if root.tracker.trouble is not None:
        said.append(f"{root.folder / TRACKER} is damaged: {root.tracker.trouble}")
    elif root.tracker.name is None:
        said.append(f"{root.folder / TRACKER} is missing")
    for name in root.names():
        trouble = inspector.problem(root.path(name))
        if trouble is None:
            if root.path(name) in inspector.unchecked:
                unchecked = _unchecked(root.path(name))
                return name, unchecked if name == root.tracker.name else "; ".join(
                    [*said, unchecked]
                )
            return name, "; ".join(said)
        said.append(f"checkpoint {root.path(name)} is damaged: {trouble}")
    return None, "; ".join(said)


def _unchecked(folder: Path) -> str:
    return (
        f"{folder} has no {MANIFEST} (it is older, or was written without): its bytes are unchecked"
    )


def _put_right(folder: Path, name: str, *, repair: bool, inspector: Inspector) -> None:
    """Rewrite the tracker file on one rank, and tell all of them where that fails."""
    failed = None
    if repair:
        try:
            Tracker.put_right(folder, name)
        except ConfigError as error:
            failed = str(error)
    failure = next(filter(None, inspector.ranks.gather(failed)), None)
    if failure is not None:
        raise ConfigError(failure)


def choose(
    args: Namespace, *, repair: bool, inspector: Inspector | None = None
) -> tuple[int | None, str | None]:
    """Find the checkpoint to start from, in ``args.load``.

    Args:
        args: parsed arguments; ``explicit_load`` says that the user named the directory.
        repair: rewrite the tracker file when it does not name the chosen checkpoint (one rank
            only; the others come to the same answer before and after).
        inspector: of all ranks; by default this process looks alone.

    Returns:
        The iteration (None: start from scratch), and a warning to show or None.

    Raises:
        ConfigError: a directory was named that has no checkpoint, the iteration that was asked
            for is not there or damaged, or all checkpoints are damaged.
    """
    if args.load is None:
        return None, None
    inspector = inspector or Inspector()
    folder = Path(args.load)
    root = _Root.read(folder, inspector)
    if args.ckpt_step and args.pretrained_checkpoint is not None and root.tracker.name is None:
        root = _Root.read(Path(args.pretrained_checkpoint), inspector)
    if args.ckpt_step:
        said = _require(root, args.ckpt_step, inspector)
        if root.tracker.trouble is not None:  # Megatron reads it all the same
            _put_right(root.folder, str(args.ckpt_step), repair=repair, inspector=inspector)
        return args.ckpt_step if root.folder == folder else None, said
    if root.is_empty:
        if args.explicit_load and args.pretrained_checkpoint is None:
            raise ConfigError(
                f"--load {folder}: there is no checkpoint; "
                + (_what_else(folder) or "leave --load away to start from scratch, or correct it")
            )
        return None, None
    found, said = settle(folder, repair=repair, inspector=inspector)
    return None if found is None else 0 if found == RELEASE else int(found), said


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


def no_checkpoint(folder: Path) -> str:
    """The error of a folder without checkpoints: what is there instead, and the remedy."""
    if not folder.exists():
        return f"{folder}: there is no such folder; correct the path"
    expected = f"expected a directory with {TRACKER}, as --save and convert import write it"
    return f"{folder} holds no checkpoint; {_what_else(folder) or expected}"


def newest(
    folder: Path, iteration: int | None = None, *, inspector: Inspector | None = None
) -> Path:
    """The directory of the newest whole checkpoint in ``folder``, or of the one asked for.

    Args:
        folder: what ``--save`` or ``convert import`` wrote.
        iteration: another than the newest.
        inspector: is told what the user should know; by default nobody is.

    Raises:
        ConfigError: there is none that can be used.
    """
    inspector = inspector or Inspector()
    root = _Root.read(folder, inspector)
    if iteration is not None:
        said = _require(root, iteration, inspector)
        inspector.said += [said] if said else []
        return root.path(str(iteration))
    if not root.names():
        raise ConfigError(no_checkpoint(folder))
    found, text = _first_whole(root, inspector)
    if found is None:
        raise ConfigError(f"{text}; no complete checkpoint is left there; restore it")
    if found != root.tracker.name:
        text += f"; using {root.path(found)}"
    inspector.said += [text] if text else []
    return root.path(found)


def saved_arguments(checkpoint: Path) -> Namespace | None:
    """The arguments of the run that wrote a checkpoint; None for one that no run wrote.

    Args:
        checkpoint: one iteration's directory.
    """
    from megatron.core.dist_checkpointing import load_common_state_dict

    if not (checkpoint / "metadata.json").is_file():
        return _saved_with_torch(checkpoint)
    select_backend()  # which lets torch unpickle what a checkpoint is made of, and no more
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no process group: none is needed
        try:
            args: Namespace | None = load_common_state_dict(str(checkpoint)).get("args")
        except Exception as error:  # of any kind, for damaged bytes
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
    tracked = Tracker.read(folder).iteration
    if keep == 0 or tracked is None:
        return
    done = {number: path for number, path in checkpoints(folder).items() if number <= tracked}
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


def require_whole(folder: Path, inspector: Inspector) -> None:
    """Refuse one iteration's folder that was named and cannot be loaded.

    Raises:
        ConfigError: with what is wrong with it.
    """
    trouble = inspector.problem(folder)
    if trouble is not None:
        raise ConfigError(
            f"checkpoint {folder} cannot be used: {trouble}; name its parent folder, for the "
            "newest whole one, or restore it"
        )
    if folder in inspector.unchecked:
        inspector.said.append(_unchecked(folder))


def _require(root: _Root, step: int, inspector: Inspector) -> str | None:
    """Refuse an iteration that was asked for and cannot be loaded; what to say of one that can."""
    path = root.path(str(step))
    trouble = inspector.problem(path)
    if trouble is not None:
        others = [str(number) for number in root.numbers if number != step]
        raise ConfigError(
            f"iteration {step} was asked for: checkpoint {path} cannot be used: {trouble}; "
            f"available: {', '.join(others) or 'none'}: name one of these, or none for the newest "
            "whole one"
        )
    if root.tracker.name == RELEASE:
        raise ConfigError(
            f"iteration {step} was asked for, and {root.folder / TRACKER} says {RELEASE!r}, which "
            f"Megatron loads then; write {step} into it"
        )
    return _unchecked(path) if path in inspector.unchecked else None
