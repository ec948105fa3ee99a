"""Where the model runs: ``"cuda"`` (NCCL) or ``"cpu"`` (gloo)."""

from __future__ import annotations

import torch

from megatron.mimo.backend.capabilities import (
    Capabilities,
    capabilities,
    usable_transformer_engine,
)

__all__ = ["Capabilities", "capabilities", "select_backend"]


def select_backend(name: str | None = None) -> str:
    """Chooses the device of this process and prepares megatron-core for it.

    Call it first thing, before models are built and before process groups are made.

    Args:
        name: ``"cpu"``, ``"cuda"``, or None: CUDA where a usable device exists, else the CPU. Once
            the CPU has been selected, None keeps it.

    Returns:
        The backend in use, ``"cpu"`` or ``"cuda"``.

    Raises:
        ValueError: ``name`` is none of these, or ``"cuda"`` where no usable device exists.
        RuntimeError: the CPU is asked for after CUDA was used, or CUDA after the CPU was selected.
    """
    # It patches, and asks what the machine can do, which asks here.
    from megatron.mimo.backend import cpu

    if name not in (None, "cpu", "cuda"):
        raise ValueError(f"backend {name!r} is unknown; expected 'cpu', 'cuda' or None")
    if name == "cuda" and cpu.is_applied():
        raise RuntimeError(
            "backend 'cuda' asked for, but 'cpu' has been selected in this process; start a new one"
        )
    if name == "cpu" or cpu.is_applied() or (name is None and not torch.cuda.is_available()):
        cpu.apply()
        return "cpu"
    if not torch.cuda.is_available():
        raise ValueError(
            "backend 'cuda' asked for, but torch sees no usable CUDA device; check the driver and "
            "CUDA_VISIBLE_DEVICES, or use 'cpu'"
        )
    usable_transformer_engine()  # hides one that does not load, before Megatron meets it
    cpu.apply_defect_patches()
    return "cuda"
