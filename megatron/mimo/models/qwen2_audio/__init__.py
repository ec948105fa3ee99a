"""Qwen2-Audio: clips of any length."""
