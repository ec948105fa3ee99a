"""Refuses flags under which a run would not write, or not load, its own checkpoints."""

from __future__ import annotations

import os
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path

from megatron.core.models.mimo.errors import ConfigError

__all__ = ["check_saving"]

_EMERGING = ("muon", "lion")  # from the package emerging_optimizers


def check_saving(args: Namespace) -> None:
    """Check folders, optimizer, format and kind of the checkpoints, before Megatron does.

    Raises:
        ConfigError: naming the flags, and what to give in their place.
    """
    _check_folders(args)
    _check_optimizer(args)
    _check_format(args)
    if args.use_persistent_ckpt_worker:
        raise ConfigError(
            "--use-persistent-ckpt-worker is not supported: its process would go on writing when "
            "its rank is killed; leave it away, and --async-save starts one for each checkpoint"
        )
    if args.non_persistent_save_interval or args.non_persistent_ckpt_type:
        raise ConfigError(
            "non-persistent checkpoints (--non-persistent-save-interval, "
            "--non-persistent-ckpt-type) are not supported; --save-interval with "
            "--keep-checkpoints N keeps the newest N and removes the others, and "
            "--save-retain-interval keeps every so many of them"
        )


def _check_folders(args: Namespace) -> None:
    """Refuse files, pipes and the like where a folder has to be, and folders in a file's place."""
    for name in ("output", "save", "tensorboard_dir", "load", "pretrained_checkpoint"):
        value = getattr(args, name, None)
        if value is None:
            continue
        flag, folder = "--" + name.replace("_", "-"), Path(value)
        nearest = next(filter(os.path.lexists, (folder, *folder.absolute().parents)))
        if not nearest.is_dir():
            raise ConfigError(
                f"{flag} {value}: {nearest} is not a folder; name another one, or move it away"
            )
        if name in ("output", "save") and not os.access(nearest, os.W_OK | os.X_OK):
            raise ConfigError(f"{flag} {value}: {nearest} cannot be written to; name another one")
    for name in ("loss.csv", "metrics.json") if args.output is not None else ():
        file = Path(args.output, name)
        if os.path.lexists(file) and not file.is_file():
            raise ConfigError(f"--output {args.output}: {file} is not a file; move it away")


def _check_optimizer(args: Namespace) -> None:
    name = args.optimizer
    if name != "adam" and args.use_distributed_optimizer:
        raise ConfigError(
            f"--optimizer {name} with --use-distributed-optimizer: megatron-core 0.19 cannot build "
            "it for this model; leave one of them away"
        )
    if name in ("adam", "sgd"):
        return
    if name not in _EMERGING:
        raise ConfigError(
            f"--optimizer {name} does not train and save with megatron-core 0.19; use adam, sgd, "
            "muon or lion"
        )
    if find_spec("emerging_optimizers") is None:
        raise ConfigError(
            f"--optimizer {name} needs the package emerging-optimizers, which is not installed; "
            "install it, or use adam or sgd"
        )
    if args.fp16:
        raise ConfigError(f"--optimizer {name} does not work with --fp16; use --bf16 or --fp32")


def _check_format(args: Namespace) -> None:
    if args.ckpt_format not in ("torch_dist", "torch") or args.use_torch_fsdp2:
        flag = "--use-torch-fsdp2" if args.use_torch_fsdp2 else f"--ckpt-format {args.ckpt_format}"
        raise ConfigError(
            f"{flag} belongs to FSDP, which is not supported; use --use-distributed-optimizer "
            "and --ckpt-format torch_dist (the default) or torch"
        )
    if args.ckpt_format != "torch":
        return
    if args.async_save:
        raise ConfigError(
            "--async-save does not work with --ckpt-format torch; use torch_dist (the default)"
        )
    if args.ckpt_step and args.use_distributed_optimizer:
        raise ConfigError(
            "--ckpt-step with --ckpt-format torch and --use-distributed-optimizer: Megatron takes "
            "the optimizer's state from the newest checkpoint whatever the step; write the step "
            "into latest_checkpointed_iteration.txt instead"
        )
