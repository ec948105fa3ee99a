"""LLaVA with ears: images and audio."""
