"""Command line and ``--config`` to validated arguments, and models built from these alone."""
