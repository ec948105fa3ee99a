"""Chooses what a run starts from, its own checkpoint, another or none, and checks the flags."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron.core.models.mimo.errors import ConfigError
from megatron.mimo.checkpoints.assets import changed_asset
from megatron.mimo.checkpoints.folders import ASSETS, choose, newest, saved_arguments, settle
from megatron.mimo.checkpoints.inspection import Inspector
from megatron.mimo.lora import saved_settings, settings_from
from megatron.mimo.process.ranks import starting_job
from megatron.mimo.training.mismatch import check_command, what_moved

__all__ = ["choose_start"]


def choose_start(args: Namespace, *, repair: bool) -> tuple[int | None, str | None]:
    """Extends ``choose`` to a run that may have begun from another run's checkpoint.

    With ``--load`` or ``--pretrained-checkpoint`` of another run, the run's own checkpoints come
    first, so that the same command continues it: ``--ckpt-step`` is one of the other run. A
    checkpoint without adapters gives a run with ``--lora`` its weights, and nothing else: the run
    begins at step 0. ``args`` are changed accordingly.

    Args:
        args: parsed arguments.
        repair: as ``choose`` takes it.

    Returns:
        As ``choose``.

    Raises:
        ConfigError: what ``choose`` raises; adapters, model, optimizer or format that differ from
            those of the checkpoint.
    """
    args.loads_adapters = True
    inspector = Inspector(starting_job(), hashes=args.checkpoint_hashes)
    began_elsewhere = args.save is not None and Path(args.load) != Path(args.save)
    origin = args.load if began_elsewhere else args.pretrained_checkpoint
    said: list[str | None] = []
    if origin is not None and args.save is not None and _is_complete(Path(args.save), inspector):
        flag = "--load" if began_elsewhere else "--pretrained-checkpoint"
        said.append(
            f"continuing the run in {args.save}; it began from {flag} {origin}, "
            "which is not read again"
        )
        args.load, args.finetune, args.ckpt_step = args.save, False, None
        began_elsewhere = False
    elif args.ckpt_step and not began_elsewhere and args.pretrained_checkpoint is None:
        said.append(
            f"--ckpt-step: going back to iteration {args.ckpt_step}, at each start of this command"
        )
    start, warning = choose(args, repair=repair, inspector=inspector)
    said.append(warning)
    if start is None and args.pretrained_checkpoint is not None and not args.ckpt_step:
        _, warning = settle(Path(args.pretrained_checkpoint), repair=repair, inspector=inspector)
        said.append(warning)
    folder = _folder(args, start, inspector)
    args.checkpoint = None if folder is None else str(folder)
    if folder is None and args.exit_on_missing_checkpoint:
        raise ConfigError(
            f"--exit-on-missing-checkpoint: there is no checkpoint in {args.load}; leave the flag "
            "away to start from scratch"
        )
    if folder is not None:
        if inspector.hashes:
            said.append(changed_asset(folder.parent / ASSETS))
        _check_adapters(args, folder, is_own=not began_elsewhere and start is not None)
        saved = saved_arguments(folder)
        if saved is not None:
            goes_on = bool(start) and not args.finetune
            said.append(check_command(args, saved, folder, goes_on=goes_on))
            said.append(what_moved(args, saved) if goes_on else None)
    return start, "; ".join(filter(None, said)) or None


def _is_complete(folder: Path, inspector: Inspector) -> bool:
    return settle(folder, repair=False, inspector=inspector)[0] is not None


def _folder(args: Namespace, start: int | None, inspector: Inspector) -> Path | None:
    """The directory that Megatron will read; what is to be said of it has been."""
    if start is not None:
        return newest(Path(args.load), start or None, inspector=inspector)
    if args.pretrained_checkpoint is not None:
        origin = Path(args.pretrained_checkpoint)
        return newest(origin, args.ckpt_step or None, inspector=inspector)
    return None


def _check_adapters(args: Namespace, folder: Path, *, is_own: bool) -> None:
    wanted, saved = settings_from(args), saved_settings(folder)
    if wanted is None and saved is None:
        return
    if wanted is None:
        assert saved is not None
        raise ConfigError(
            f"{folder} has adapters: --lora {' '.join(saved.modules)} --lora-rank {saved.rank} "
            f"--lora-alpha {saved.alpha:g} --lora-targets {' '.join(saved.targets)}; give these "
            "flags, or merge them: python -m megatron.mimo.convert export, then import"
        )
    if saved is None:
        if is_own:
            raise ConfigError(
                f"--lora: the run in {args.save} has no adapters; start another one from it: "
                f"--load {args.save} --output ..."
            )
        args.loads_adapters = False
        args.finetune = True
        return
    for flag, ours, theirs in (
        ("--lora", sorted(wanted.modules), sorted(saved.modules)),
        ("--lora-targets", sorted(wanted.targets), sorted(saved.targets)),
        ("--lora-rank", wanted.rank, saved.rank),
        ("--lora-alpha", wanted.alpha, saved.alpha),
    ):
        if ours != theirs:
            raise ConfigError(
                f"{flag} is {_text(ours)} and the adapters in {folder} were made with "
                f"{_text(theirs)}; give the same"
            )


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else f"{value:g}"
