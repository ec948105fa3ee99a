"""Qwen2.5-VL: images and clips of any size."""
