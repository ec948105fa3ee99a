"""What this machine has: ``python -m benchmarks.gpu_check.machine`` prints it as JSON."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["facts", "missing"]

_FP8 = (8, 9)  # the compute capability that FP8 begins with


def facts() -> dict[str, Any]:
    """Python, packages, GPU; what is installed and cannot be used counts as absent."""
    import torch

    from megatron.mimo.backend.capabilities import capabilities

    can = capabilities()
    found: dict[str, Any] = {
        "gpu": can.card,
        "python": platform.python_version(),
        "cpus": len(os.sched_getaffinity(0)),
        "packages": {
            "torch": torch.__version__,
            "megatron-core": _version("megatron-core"),
            "transformer_engine": can.transformer_engine,
            "apex": ", ".join(sorted(can.apex)) or None,
            "flash-attn": can.flash_attn,
            "transformers": _version("transformers"),
            "pytest": _version("pytest"),
        },
    }
    if can.device != "cpu":
        found |= {
            "memory_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1),
            "gpus": torch.cuda.device_count(),
            "capability": list(can.compute_capability or ()),
            "driver": _driver(),
        }
    return found


def missing(machine: Mapping[str, Any], needs: Sequence[str]) -> str:
    """Why a step cannot run here, in words; empty when it can.

    Args:
        machine: what :func:`facts` found.
        needs: any of "gpu", "te", "fp8", "graphs" and "pytest".
    """
    packages = machine.get("packages", {})
    reasons = {
        "gpu": "" if machine.get("gpu") else "no GPU",
        "graphs": "" if machine.get("gpu") else "no GPU to capture CUDA graphs on",
        "te": "" if packages.get("transformer_engine") else "no usable Transformer Engine",
        "pytest": "" if packages.get("pytest") else "pytest is not installed",
        "fp8": ""
        if tuple(machine.get("capability") or ()) >= _FP8
        else "FP8 needs compute capability 8.9",
    }
    return "; ".join(reasons[need] for need in needs if reasons[need])


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (answer.stdout.strip().splitlines() or [""])[0] or None


if __name__ == "__main__":
    print(json.dumps(facts()))
