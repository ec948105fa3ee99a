"""A campaign against the promises of docs/reliability.md: ``python -m tests.chaos --help``."""
