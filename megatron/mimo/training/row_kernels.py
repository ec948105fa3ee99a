"""Whether this rank places rows by Triton's kernels."""

from __future__ import annotations

import functools
import warnings
from argparse import Namespace

import torch

from megatron.core.models.mimo.alignment.kernel_trial import why_no_kernels

__all__ = ["places_by_kernels"]


def places_by_kernels(args: Namespace, device: torch.device) -> bool:
    """Whether plans are indexed for the kernels: asked for, on a GPU, and after a trial.

    Where the trial fails a warning says why, and torch places the rows: with equal results.
    """
    return device.type == "cuda" and args.row_kernels == "triton" and _trial(device)


@functools.cache
def _trial(device: torch.device) -> bool:
    reason = why_no_kernels(device)
    if reason is not None:
        warnings.warn(
            f"rows of text and media are placed by torch, not by Triton's kernels ({reason}); "
            "--row-kernels torch says so at once",
            stacklevel=3,
        )
    return reason is None
