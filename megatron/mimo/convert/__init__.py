"""Conversion between Hugging Face's format and ours."""
