"""Rows of frozen encoders on disk, and micro-batches that take them from there."""
