"""Lengths of the documents of a micro-batch, by which tokens and FLOPs are counted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron.mimo.data.micro_batches.batch import LENGTHS, Batch, Collator
from megatron.mimo.data.sample import Sample

__all__ = ["collate_and_count"]


def collate_and_count(collate: Collator, items: Sequence[Any]) -> Batch:
    """A micro-batch that says under ``LENGTHS`` how long its documents are, if they are samples.

    Args:
        collate: of the items.
        items: samples, or packed sequences (tuples) of them.
    """
    batch = collate(items)
    documents = [one for item in items for one in (item if isinstance(item, tuple) else [item])]
    if all(isinstance(one, Sample) for one in documents):
        batch[LENGTHS] = [len(one.token_ids) for one in documents]
    return batch
