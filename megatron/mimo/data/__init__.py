"""Samples, their collation into micro-batches, and the data sets that recipes train on.

Torch and Megatron are imported when one of the names is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron.mimo.data.collate import SampleCollator
    from megatron.mimo.data.images import decode_image
    from megatron.mimo.data.media import MediaFormat
    from megatron.mimo.data.packing import PackedDataset, PackingCollator, first_fit
    from megatron.mimo.data.positions import grid_positions
    from megatron.mimo.data.sample import MediaItem, Sample

__all__ = [
    "MediaFormat",
    "MediaItem",
    "PackedDataset",
    "PackingCollator",
    "Sample",
    "SampleCollator",
    "decode_image",
    "first_fit",
    "grid_positions",
]

_MODULES = {
    **dict.fromkeys(("PackedDataset", "PackingCollator", "first_fit"), "packing"),
    **dict.fromkeys(("MediaItem", "Sample"), "sample"),
    "MediaFormat": "media",
    "SampleCollator": "collate",
    "decode_image": "images",
    "grid_positions": "positions",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
