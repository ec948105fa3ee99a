"""Runs megatron-core 0.19 without CUDA, on CPU tensors and gloo.

``apply()`` puts the patches of :data:`PATCHES` in place, in this process, once. Stock
``megatron.training.pretrain`` then trains, evaluates, saves and resumes on the CPU without a flag.
``torch`` keeps the truth about CUDA: only ``megatron.*`` modules see a device, the CPU.
"""

from __future__ import annotations

import os

import torch
import torch.distributed

from megatron.mimo.backend import torch_view
from megatron.mimo.backend.capabilities import hide_cuda_packages
from megatron.mimo.backend.defects import DEFECTS
from megatron.mimo.backend.memory import keep_freed_memory
from megatron.mimo.backend.patch import Patch
from megatron.mimo.backend.patching import PROCESS
from megatron.mimo.backend.table import PATCHES

__all__ = ["PATCHES", "Patch", "apply", "apply_defect_patches", "is_applied"]

_applied = False


def is_applied() -> bool:
    """Whether this process runs megatron-core on the CPU."""
    return _applied


def apply() -> None:
    """Puts every patch in place; a second call does nothing.

    Call it before models are built; modules already imported are patched as well as those imported
    later. A process forked afterwards inherits the patches.

    Raises:
        RuntimeError: this process has used CUDA: its tensors and groups would mix with the CPU's.
    """
    global _applied
    if _applied:
        return
    _refuse_live_cuda()
    hide_cuda_packages()
    keep_freed_memory()
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    PROCESS.apply(PATCHES, torch_view.build_view())
    _applied = True


def apply_defect_patches() -> None:
    """Puts in place only what megatron-core 0.19 from PyPI needs on every backend."""
    PROCESS.apply(DEFECTS)


def _refuse_live_cuda() -> None:
    remedy = "select the backend before anything touches CUDA, or start a new process"
    if torch.cuda.is_initialized():
        raise RuntimeError(
            "the CPU backend cannot be applied: CUDA is initialised in this process, expected it "
            f"untouched; {remedy}"
        )
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        backend = torch.distributed.get_backend()
        if "nccl" in backend:
            raise RuntimeError(
                "the CPU backend cannot be applied: the default process group uses "
                f"{backend!r}, expected 'gloo' or no group; {remedy}"
            )
