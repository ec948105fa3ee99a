"""Gemma 3: images as blocks of rows that see each other."""
