"""Refuses flags without the other flags, packages or device that they need."""

from __future__ import annotations

from argparse import Namespace
from importlib.util import find_spec

from megatron.core.models.mimo.errors import ConfigError
from megatron.mimo.backend import Capabilities

__all__ = ["check_prerequisites"]


def check_prerequisites(args: Namespace, machine: Capabilities) -> None:
    """Check the learning rate, what is to be profiled and where figures are to go.

    Raises:
        ConfigError: names the flag and what to give or install.
    """
    _check_rate(args)
    _check_profile(args, machine)
    if args.wandb_project and not _installed("wandb"):
        raise ConfigError(
            "--wandb-project needs the package wandb, which is not installed; "
            "pip install 'megatron-mimo[wandb]', or leave the flag away"
        )


def _check_rate(args: Namespace) -> None:
    if args.lr is not None and args.lr < args.min_lr:
        raise ConfigError(
            f"--lr {args.lr:g} is lower than --min-lr {args.min_lr:g}, to which it falls; "
            f"give --min-lr {args.lr:g} or less as well"
        )
    for flag, rate in (("--lr", args.lr), ("--min-lr", args.min_lr)):
        if rate is not None and rate < 0:
            raise ConfigError(f"{flag} {rate:g}: must be 0 or more")
    if args.lr_decay_style != "WSD" or args.skip_train:
        return
    unit = "samples" if args.train_samples else "iters"
    if getattr(args, f"lr_wsd_decay_{unit}") is None:
        raise ConfigError(
            f"--lr-decay-style WSD needs --lr-wsd-decay-{unit} N: the rate stays until N before "
            "the end, and falls then"
        )


def _check_profile(args: Namespace, machine: Capabilities) -> None:
    on_gpu = machine.device != "cpu"
    if args.use_pytorch_profiler and not args.profile:
        raise ConfigError("--use-pytorch-profiler has no effect without --profile; give it as well")
    if args.profile and args.use_pytorch_profiler and args.tensorboard_dir is None:
        raise ConfigError(
            "--profile writes beside the TensorBoard folder, and there is none; give "
            "--tensorboard-dir DIR, or leave --no-output away"
        )
    first, end = args.profile_step_start, args.profile_step_end
    if args.profile and not 1 <= first < end:
        raise ConfigError(
            f"--profile-step-start {first} --profile-step-end {end}: iterations count from 1, and "
            "those before the end are profiled; give an end after the start"
        )
    beyond = [rank for rank in args.profile_ranks if not 0 <= rank < args.world_size]
    if args.profile and beyond:
        raise ConfigError(
            f"--profile-ranks {' '.join(map(str, beyond))}: the run has the ranks 0 to "
            f"{args.world_size - 1}"
        )
    for flag, is_on in (
        ("--record-memory-history", args.record_memory_history),
        ("--nvtx-ranges", args.nvtx_ranges),
        ("--log-memory-to-tensorboard", args.log_memory_to_tensorboard),
        ("--log-memory-interval", args.log_memory_interval),
        ("--log-device-memory-used", args.log_device_memory_used),
    ):
        if is_on and not on_gpu:
            raise ConfigError(f"{flag} needs a GPU; leave it away")


def _installed(package: str) -> bool:
    """Whether there is a package of this name, and not only a folder that runs have left."""
    found = find_spec(package)
    return found is not None and found.origin is not None
