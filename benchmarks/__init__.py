"""Every performance claim of the project, as a script; see docs/benchmarks.md."""
