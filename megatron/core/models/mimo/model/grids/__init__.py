"""Modules with process grids of their own: what this rank runs, and rows between the grids."""
