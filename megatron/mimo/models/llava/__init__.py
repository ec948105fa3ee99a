"""LLaVA: images of one size."""
