"""Cutting sequences for context and sequence parallelism."""
