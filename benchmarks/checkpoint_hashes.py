"""What hashing a checkpoint costs: the rate of hashes, and seconds beside a save and a load.

    python benchmarks/checkpoint_hashes.py --json
    python benchmarks/checkpoint_hashes.py --gigabytes 8 --folder /a/disk

A state of random tensors, as large as asked for, is saved by megatron-core's ``dist_checkpointing``
on one process, hashed as a run does it, compared as at the start of a run, and loaded. Each is
repeated; figures are medians. The files are in the page cache when they are hashed, as in a run,
which has just written them; ``--cold`` asks the kernel to drop them before they are compared.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

HASHES: dict[str, Callable[[bytes], object]] = {
    "crc32": zlib.crc32,
    "sha256": lambda data: hashlib.sha256(data).digest(),
    "blake2b": lambda data: hashlib.blake2b(data).digest(),
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cold", action="store_true", help="drop files from memory before loading")
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary one")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mimo-hashes-", dir=given.folder) as name:
        result = measure(Path(name), given.gigabytes, given.repeats, cold=given.cold)
    if given.json:
        print(json.dumps(result))
        return
    for title, rate in result["gb_per_s"].items():
        print(f"{title:<8} {rate:.2f} GB/s on one core")
    print(
        f"{result['gigabytes']} GB: saved in {result['save_s']} s, hashed in {result['hash_s']} s "
        f"({result['percent_of_save']} % of a save); compared in {result['compare_s']} s, loaded "
        f"in {result['load_s']} s ({result['percent_of_load']} % of a load)"
    )


def measure(folder: Path, gigabytes: float, repeats: int, *, cold: bool = False) -> dict[str, Any]:
    """All figures."""
    from megatron.mimo.arguments.standalone import process_groups
    from megatron.mimo.checkpoints.hashed_saving import hash_checkpoint
    from megatron.mimo.checkpoints.inspection import Inspector

    seconds: dict[str, list[float]] = {"save": [], "hash": [], "compare": [], "load": []}
    with process_groups():
        for number in range(repeats):
            place = folder / f"iter_{number:07d}"
            place.mkdir()
            seconds["save"].append(_timed(partial(_save, _state(gigabytes), place)))
            seconds["hash"].append(_timed(partial(hash_checkpoint, place)))
            if cold:
                _drop(place)
            inspector = Inspector()
            seconds["compare"].append(_timed(partial(inspector.problem, place)))
            assert inspector.problem(place) is None
            seconds["load"].append(_timed(partial(_load, _state(gigabytes), place)))
            size = sum(path.stat().st_size for path in place.iterdir())
            shutil.rmtree(place)
    median = {name: statistics.median(several) for name, several in seconds.items()}
    return {
        "gigabytes": round(size / 1e9, 2),
        "repeats": repeats,
        "cpus": os.cpu_count(),
        "cold": cold,
        "gb_per_s": {name: round(_rate(function), 2) for name, function in HASHES.items()},
        **{f"{name}_s": round(value, 3) for name, value in median.items()},
        "percent_of_save": round(100 * median["hash"] / median["save"], 1),
        "percent_of_load": round(100 * median["compare"] / median["load"], 1),
    }


def _state(gigabytes: float) -> dict[str, Any]:
    import torch

    from megatron.core.dist_checkpointing import ShardedTensor

    count = max(1, round(gigabytes * 10))  # of 100 MB each
    rows = max(1, round(gigabytes * 1e9 / count / 4096))
    return {
        f"weight{number}": ShardedTensor.from_rank_offsets(
            f"weight{number}", torch.full((rows, 1024), number / 7)
        )
        for number in range(count)
    }


def _save(state: dict[str, Any], folder: Path) -> None:
    from megatron.core import dist_checkpointing

    dist_checkpointing.save(state, str(folder))


def _load(state: dict[str, Any], folder: Path) -> None:
    from megatron.core import dist_checkpointing

    dist_checkpointing.load(state, str(folder))


def _drop(folder: Path) -> None:
    for path in folder.iterdir():
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def _timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _rate(function: Callable[[bytes], object]) -> float:
    data = os.urandom(2**26)
    return len(data) / statistics.median(_timed(lambda: function(data)) for _ in range(7)) / 1e9


if __name__ == "__main__":
    main()
