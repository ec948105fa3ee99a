"""What this machine has: ``python -m benchmarks.gpu_check.machine`` prints it as JSON."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["facts", "missing"]

_DISTRIBUTIONS = (
    ("torch", "torch"),
    ("megatron-core", "megatron-core"),
    ("transformer_engine", "transformer-engine"),
    ("apex", "apex"),
    ("transformers", "transformers"),
    ("pytest", "pytest"),
)
_FP8 = (8, 9)  # the compute capability that FP8 begins with


def facts() -> dict[str, Any]:
    """Python, packages, GPU; torch is imported, and Transformer Engine where there is one."""
    import torch

    found: dict[str, Any] = {
        "python": platform.python_version(),
        "cpus": len(os.sched_getaffinity(0)),
        "packages": {name: _version(name, of) for name, of in _DISTRIBUTIONS},
        "torch_cuda": torch.version.cuda,
        "gpu": None,
    }
    found["packages"]["torch"] = torch.__version__
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "gpus": torch.cuda.device_count(),
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "capability": [properties.major, properties.minor],
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
        "te": "" if packages.get("transformer_engine") else "Transformer Engine does not import",
        "pytest": "" if packages.get("pytest") else "pytest is not installed",
        "fp8": ""
        if tuple(machine.get("capability") or ()) >= _FP8
        else "FP8 needs compute capability 8.9",
    }
    return "; ".join(reasons[need] for need in needs if reasons[need])


def _version(module: str, distribution: str) -> str | None:
    """The version of what imports; None where it does not."""
    if module in ("transformer_engine", "apex"):  # installed is not yet usable
        try:
            imported = importlib.import_module(f"{module}.pytorch" if module[0] == "t" else module)
        except Exception as error:  # noqa: BLE001 - whatever its import raises, it is not there
            if importlib.util.find_spec(module) is not None:
                sys.stderr.write(f"{module} does not import: {type(error).__name__}: {error}\n")
            return None
        del imported
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        found = importlib.util.find_spec(module) if module.isidentifier() else None
        if found is None:
            return None
        return str(getattr(importlib.import_module(module), "__version__", "unknown version"))


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
