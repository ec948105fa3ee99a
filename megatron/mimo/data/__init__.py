"""From files of records to the micro-batches that a model trains on.

    sources -> RawRecord -> formats -> Conversation -> chat, media -> Sample -> micro_batches

``reading`` does this for one record, ``global_batches`` says which records a batch consists of.
Torch and Megatron are imported when one of the names is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron.mimo.data.media.image_tensors import decode_image
    from megatron.mimo.data.media_format import MediaFormat
    from megatron.mimo.data.micro_batches.collate import SampleCollator
    from megatron.mimo.data.micro_batches.packing import PackedDataset, PackingCollator, first_fit
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
    **dict.fromkeys(("PackedDataset", "PackingCollator", "first_fit"), "micro_batches.packing"),
    **dict.fromkeys(("MediaItem", "Sample"), "sample"),
    "MediaFormat": "media_format",
    "SampleCollator": "micro_batches.collate",
    "decode_image": "media.image_tensors",
    "grid_positions": "positions",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
