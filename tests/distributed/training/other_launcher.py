"""The example script as a task of Slurm or an MPI: ``other_launcher.py KIND FLAGS...``.

A process of the rank pool forgets what torchrun would have told it and is told the same in the
words of another launcher.
"""

from __future__ import annotations

import os
import sys

from megatron.mimo.training import main


def _words(kind: str, rank: str, size: str) -> dict[str, str]:
    if kind == "slurm":
        return {
            "SLURM_JOB_ID": f"{os.getppid()}",
            "SLURM_PROCID": rank,
            "SLURM_LOCALID": rank,
            "SLURM_NTASKS": size,
            "SLURM_STEP_NUM_TASKS": size,
            "SLURM_STEP_NUM_NODES": "1",
            "SLURM_STEP_NODELIST": "node-of-nowhere",
        }
    if kind == "open-mpi":
        return {
            "OMPI_COMM_WORLD_RANK": rank,
            "OMPI_COMM_WORLD_SIZE": size,
            "OMPI_COMM_WORLD_LOCAL_RANK": rank,
            "OMPI_COMM_WORLD_LOCAL_SIZE": size,
        }
    if kind == "half":
        return {"WORLD_SIZE": "2"}
    return {"PMI_RANK": rank, "PMI_SIZE": size, "MPI_LOCALRANKID": rank, "MPI_LOCALNRANKS": size}


if __name__ == "__main__":
    rank, size = os.environ["RANK"], os.environ["WORLD_SIZE"]
    for name in list(os.environ):
        if name.startswith(("TORCHELASTIC_", "MASTER_", "LOCAL_", "RANK", "WORLD_SIZE")):
            del os.environ[name]
    os.environ.update(_words(sys.argv.pop(1), rank, size))
    sys.exit(main())
