"""Qwen3-VL: images and clips of any size, dense and with experts."""
