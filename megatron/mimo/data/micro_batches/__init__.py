"""Samples to micro-batches, and micro-batches to the ranks and devices that compute with them."""
