"""Samples, their collation into micro-batches, and the data sets that recipes train on."""

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
