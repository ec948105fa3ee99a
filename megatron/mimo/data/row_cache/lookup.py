"""Replaces the encoder inputs of media whose rows are in a cache by these rows.

Legend: N rows of the media that were found, H features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from megatron.mimo.data.micro_batches.batch import Batch
from megatron.mimo.data.row_cache.cache import KEY_BYTES, RowCache

__all__ = [
    "BESIDE",
    "COUNTS",
    "KEYS",
    "ROWS",
    "SHARED",
    "Caches",
    "look_up",
    "take_items",
    "with_rows",
]

# Beside the arguments of an encoder in a batch:
ROWS = "cached_rows"  # bfloat16 [tensors, N, H] of all media that were found, in order
COUNTS = "cached_counts"  # rows of each medium that was found, -1 of the others
KEYS = "cached_keys"  # of the media that were not
SHARED = "cached_shared"  # numbers of those, among them, that no context-parallel rank has found
BESIDE = (ROWS, COUNTS, KEYS, SHARED)  # no encoder takes these

Caches = Mapping[tuple[str, str], RowCache]  # of a modality's encoder


class LookedUp(Dataset[Batch]):
    """Batches of another dataset, with rows from caches in them.

    Args:
        batches: collated, by whatever their numbers are.
        caches: of the encoders that have one.
    """

    def __init__(self, batches: Dataset[Batch], caches: Caches) -> None:
        self._batches = batches
        self._caches = caches

    def __getitem__(self, index: Any) -> Batch:
        return look_up(self._batches[index], self._caches)


def look_up(batch: Batch, caches: Caches) -> Batch:
    """A batch with rows in place of inputs, for every medium that a cache has.

    Args:
        batch: collated, on the host.
        caches: of the encoders that have one.
    """
    inputs = dict(batch.get("modality_inputs") or {})
    for (modality, encoder), cache in caches.items():
        arguments = inputs.get(modality, {}).get(encoder)
        if arguments and len(next(iter(arguments.values()))):
            looked = _looked_up(arguments, cache)
            inputs[modality] = {**inputs[modality], encoder: looked}
    return {**batch, "modality_inputs": inputs}


def with_rows(batches: Dataset[Batch], caches: Caches) -> Dataset[Batch]:
    """A dataset whose batches are looked up in the caches, if there are any."""
    return LookedUp(batches, caches) if caches else batches


def take_items(arguments: Mapping[str, Any], items: list[int]) -> dict[str, Any]:
    """The arguments of an encoder's call for some of its items."""
    return {
        name: value[torch.tensor(items, dtype=torch.int64, device=value.device)]
        if isinstance(value, Tensor)
        else [value[item] for item in items]
        for name, value in arguments.items()
    }


def _looked_up(arguments: Mapping[str, Any], cache: RowCache) -> dict[str, Any]:
    count = len(next(iter(arguments.values())))
    keys = [_key(arguments, item) for item in range(count)]
    found = [cache.get(key) for key in keys]
    missing = [item for item in range(count) if found[item] is None]
    rows = [one for one in found if one is not None]
    looked = take_items(arguments, missing)
    looked[COUNTS] = [-1 if one is None else one.size(1) for one in found]
    looked[KEYS] = [keys[item].hex() for item in missing]
    if rows:
        looked[ROWS] = torch.cat(rows, dim=1)
    return looked


def _key(arguments: Mapping[str, Any], item: int) -> bytes:
    """The key of a medium: a digest of the arguments that the processor has made of it."""
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    for name in sorted(arguments):
        value = arguments[name][item]
        digest.update(f"{name} ".encode())
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype} {list(value.shape)} ".encode())
            digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy())
        else:
            digest.update(repr(value).encode())
    return digest.digest()
