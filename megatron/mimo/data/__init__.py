"""Samples, their collation into micro-batches, and the data sets that recipes train on."""

from megatron.mimo.data.collate import MediaFormat, SampleCollator
from megatron.mimo.data.images import decode_image
from megatron.mimo.data.sample import MediaItem, Sample

__all__ = ["MediaFormat", "MediaItem", "Sample", "SampleCollator", "decode_image"]
