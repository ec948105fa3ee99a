"""``compare_model`` on as many processes as a layout needs."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron.core.models.mimo.errors import ConfigError, MimoError
from megatron.mimo.convert.compare import Comparison, compare_model
from megatron.mimo.convert.reference import Expected
from megatron.mimo.models import load_family
from megatron.mimo.process.ports import held_port

__all__ = ["compare_on_processes", "main"]

_JOB, _REFUSAL, _TIMEOUT = "job.pickle", ".refusal", 1800.0

# the backend before Megatron is imported, as in megatron.mimo.training
_START = f"""
from megatron.mimo.process.collector import uncollected

with uncollected():
    from megatron.mimo.backend import select_backend

    select_backend()
    from {__name__} import main
main()
"""


def compare_on_processes(
    family: Any,
    config: Any,
    checkpoint: Path,
    expected: Expected,
    *,
    tp_size: int,
    pp_size: int,
    changes: Mapping[str, object] | None = None,
) -> list[Comparison]:
    """What each rank finds; arguments as for ``compare_model``.

    Raises:
        ConfigError: a process failed, or there are fewer GPUs than processes.
    """
    how: dict[str, Any] = {"tp_size": tp_size, "pp_size": pp_size, "changes": changes}
    count = tp_size * pp_size
    if count == 1:
        return [compare_model(family, config, checkpoint, expected, **how)]
    if torch.cuda.is_available() and torch.cuda.device_count() < count:
        raise ConfigError(
            f"--tp {tp_size} --pp {pp_size} needs {count} GPUs, there are "
            f"{torch.cuda.device_count()}; choose a smaller layout, or CUDA_VISIBLE_DEVICES= "
            "for a check on the CPU"
        )
    with tempfile.TemporaryDirectory(prefix="mimo-verify-") as name, held_port() as port:
        folder = Path(name)
        job = (family.name, config, checkpoint, expected, how)
        (folder / _JOB).write_bytes(pickle.dumps(job))
        _run_all(folder, count, port)
        results = [folder / f"{rank}.pickle" for rank in range(count)]
        return [pickle.loads(path.read_bytes()) for path in results]


def _run_all(folder: Path, count: int, port: int) -> None:
    common = {
        "OMP_NUM_THREADS": "1",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        # of a launcher that this process may itself be under: rank 0 has to open the store
        **{k: v for k, v in os.environ.items() if not k.startswith("TORCHELASTIC_")},
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
    }
    processes = []
    for rank in range(count):
        log = (folder / f"{rank}.log").open("wb")
        processes.append(
            subprocess.Popen(
                [sys.executable, "-W", "ignore", "-c", _START, str(folder)],
                env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=log,
                stderr=log,
            )
        )
    try:
        codes = _wait(processes)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    refusals = sorted(folder.glob(f"*{_REFUSAL}"))
    if refusals:
        raise ConfigError(refusals[0].read_text())
    failed = next((rank for rank, code in enumerate(codes) if code), None)
    if failed is not None:
        lines = (folder / f"{failed}.log").read_text(errors="replace").splitlines()
        raise ConfigError(f"rank {failed} of {count} failed: " + "\n".join(lines[-15:]))


def _wait(processes: list[subprocess.Popen[bytes]]) -> list[int | None]:
    """Exit codes, once all have ended or one has failed (the others wait for it then)."""
    ends = time.monotonic() + _TIMEOUT
    while True:
        codes = [process.poll() for process in processes]
        if any(codes) or None not in codes:
            return codes
        if time.monotonic() > ends:
            raise ConfigError(
                f"{len(processes)} processes have not ended after {_TIMEOUT:.0f} s; the model is "
                "too large for this machine: --weights-only compares the files"
            )
        time.sleep(0.1)


def main() -> None:
    """One rank, whose folder is the command line's first word."""
    folder = Path(sys.argv[1])
    name, config, checkpoint, expected, how = pickle.loads((folder / _JOB).read_bytes())
    rank = os.environ["RANK"]
    try:
        found = compare_model(load_family(name), config, checkpoint, expected, **how)
    except MimoError as error:
        (folder / f"{rank}{_REFUSAL}").write_text(str(error))
        sys.exit(2)
    (folder / f"{rank}.pickle").write_bytes(pickle.dumps(found))
