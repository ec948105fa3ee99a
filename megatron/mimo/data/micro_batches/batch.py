"""A micro-batch between the collator and the model: its type, and what of it a rank keeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from megatron.core.models.mimo.alignment import with_row_index
from megatron.core.models.mimo.alignment.cut import SequenceCut
from megatron.core.models.mimo.model.language.label_rows import find_label_rows
from megatron.core.models.mimo.partition.packing import packed_params
from megatron.core.models.mimo.partition.utils import PartitionAdapter, sequence_cut
from megatron.mimo.data.sample import Sample

__all__ = [
    "HEAD_TARGETS",
    "LABEL_ROWS",
    "LENGTHS",
    "SOURCE_IDS",
    "SOURCE_NAMES",
    "Batch",
    "Collator",
    "batch_device",
    "keep_for_stage",
]

SOURCE_IDS = "source_ids"  # int64 [B, S]: the source of each position, where there are several
SOURCE_NAMES = "source_names"  # of the sources, by number
Batch = dict[str, Any]
LENGTHS = "lengths"  # tokens of each document without padding, for whoever counts them
LABEL_ROWS = "label_rows"  # as ``MimoModel.forward`` takes it
HEAD_TARGETS = "head_targets"  # as ``MimoModel.forward`` takes it
Collator = Callable[[Sequence[Sample]], Batch]


def keep_for_stage(
    batch: Batch,
    *,
    pre_process: bool,
    post_process: bool,
    dtype: torch.dtype,
    adapter: PartitionAdapter | None = None,
    keep_plan: bool = False,
    cut_plan: bool = True,
    index_plan: bool = False,
) -> Batch:
    """Leave out what a pipeline stage has no use for, before it is moved anywhere.

    Floating-point encoder inputs become ``dtype``, the dtype of the model's parameters. With an
    ``adapter`` the plan is cut for this rank's part of the sequence, while it is on the host,
    unless ``cut_plan`` is off. Later stages go without it, unless they are to ``keep_plan``. On the
    first stage ``index_plan`` has it made ready for Triton's kernels. The last stage gets
    ``LABEL_ROWS`` beside its labels.
    """
    drop = {LENGTHS} | (set() if pre_process else {"modality_inputs", "alignment_plan"})
    if keep_plan:
        drop.discard("alignment_plan")
    of_losses = {"labels", "loss_mask", HEAD_TARGETS, SOURCE_IDS, SOURCE_NAMES}
    drop |= set() if post_process else of_losses
    kept = {name: value for name, value in batch.items() if name not in drop}
    cut = None
    if adapter is not None:
        packed = packed_params(
            batch.get("packing_kwargs"), tokens=batch["input_ids"].size(1), cp_size=adapter.cp_size
        )
        cut = sequence_cut(adapter, packed)
        if cut_plan and kept.get("alignment_plan") is not None:
            kept["alignment_plan"] = cut.share_of_plan(kept["alignment_plan"])
        if SOURCE_IDS in kept:  # as the model cuts labels and loss masks
            kept[SOURCE_IDS] = cut.context_share(kept[SOURCE_IDS])
    if index_plan and pre_process and kept.get("alignment_plan") is not None:
        kept["alignment_plan"] = with_row_index(kept["alignment_plan"])
    if post_process and "labels" in kept:
        kept[LABEL_ROWS] = _label_rows(kept, cut)
    if kept.get("modality_inputs"):
        kept["modality_inputs"] = _cast(kept["modality_inputs"], dtype)
    return kept


def _label_rows(batch: Batch, cut: SequenceCut | None) -> torch.Tensor:
    """Rows of this rank's positions that have a label."""
    labels_BS, mask_BS = batch["labels"], batch.get("loss_mask")
    if cut is not None:
        labels_BS = cut.context_share(labels_BS)
        mask_BS = None if mask_BS is None else cut.context_share(mask_BS)
    return find_label_rows(labels_BS, mask_BS)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Mapping):
        return {name: _cast(one, dtype) for name, one in value.items()}
    if isinstance(value, list):  # items of any size, or numbers that stay on the host
        return [_cast(one, dtype) for one in value]
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.to(dtype)
    return value


def batch_device() -> torch.device:
    """Where this rank's batches go."""
    if torch.distributed.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
