"""Checkpoint folders: which may be loaded, what lies in them, and the weights as tensors."""
