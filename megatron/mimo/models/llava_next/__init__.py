"""LLaVA-NeXT: images of any resolution."""
