"""Flags under which a run could not load what it saves are refused at start."""

from __future__ import annotations

import os
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path

import pytest

from megatron.core.models.mimo.errors import ConfigError
from megatron.mimo.arguments.saving import check_saving

ARGUMENTS: dict[str, object] = {
    "output": None,
    "optimizer": "adam",
    "use_distributed_optimizer": False,
    "ckpt_format": "torch_dist",
    "use_torch_fsdp2": False,
    "async_save": False,
    "use_persistent_ckpt_worker": False,
    "ckpt_step": None,
    "fp16": False,
    "non_persistent_save_interval": None,
    "non_persistent_ckpt_type": None,
}
ZERO = {"use_distributed_optimizer": True}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_persistent_ckpt_worker": True}, "--use-persistent-ckpt-worker is not supported"),
        (ZERO | {"optimizer": "sgd"}, "--optimizer sgd with --use-distributed-optimizer"),
        (ZERO | {"optimizer": "muon"}, "--optimizer muon with --use-distributed-optimizer"),
        ({"optimizer": "dist_muon"}, "--optimizer dist_muon does not train and save"),
        ({"optimizer": "soap"}, "--optimizer soap does not train and save"),
        ({"optimizer": "adaptive_muon"}, "--optimizer adaptive_muon does not train and save"),
        ({"ckpt_format": "torch_dcp"}, "--ckpt-format torch_dcp belongs to FSDP"),
        ({"ckpt_format": "fsdp_dtensor"}, "--ckpt-format fsdp_dtensor belongs to FSDP"),
        ({"use_torch_fsdp2": True}, "--use-torch-fsdp2 belongs to FSDP"),
        ({"ckpt_format": "torch", "async_save": True}, "--async-save does not work with --ckpt"),
        (ZERO | {"ckpt_format": "torch", "ckpt_step": 3}, "--ckpt-step with --ckpt-format torch"),
        ({"non_persistent_save_interval": 2}, "non-persistent .*--keep-checkpoints N keeps the"),
        ({"non_persistent_ckpt_type": "local"}, "non-persistent checkpoints .*are not supported"),
    ],
)
def test_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_saving(Namespace(**(ARGUMENTS | changes)))


@pytest.mark.parametrize("optimizer", ["muon", "lion"])
def test_optimizers_of_another_package(optimizer: str) -> None:
    args = Namespace(**(ARGUMENTS | {"optimizer": optimizer, "fp16": True}))
    missing = find_spec("emerging_optimizers") is None
    message = "needs the package emerging-optimizers" if missing else "does not work with --fp16"
    with pytest.raises(ConfigError, match=f"--optimizer {optimizer} {message}"):
        check_saving(args)


def test_accepted() -> None:
    for changes in ({}, ZERO, {"optimizer": "sgd"}, ZERO | {"ckpt_format": "torch"}):
        check_saving(Namespace(**(ARGUMENTS | changes)))


@pytest.mark.parametrize("flag", ["output", "save", "load", "tensorboard_dir"])
def test_a_file_in_the_place_of_a_folder(tmp_path: Path, flag: str) -> None:
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    name = flag.replace("_", "-")
    for value in ("file", "file/below", "pipe", "loop", "loop/a/b"):
        args = Namespace(**(ARGUMENTS | {flag: str(tmp_path / value)}))
        found = tmp_path / value.partition("/")[0]
        with pytest.raises(ConfigError, match=f"^--{name} {args.__dict__[flag]}: {found} is not a"):
            check_saving(args)
    check_saving(Namespace(**(ARGUMENTS | {flag: str(tmp_path / "new/below")})))


@pytest.mark.parametrize("name", ["loss.csv", "metrics.json"])
def test_a_folder_in_the_place_of_a_file(tmp_path: Path, name: str) -> None:
    args = Namespace(**(ARGUMENTS | {"output": str(tmp_path)}))
    (tmp_path / name).touch()
    check_saving(args)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(ConfigError, match=rf"--output .*{name} is not a file; move it away"):
        check_saving(args)
