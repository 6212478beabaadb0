"""Measurements: `python -m benchmarks.NAME` prints a table, the hardware's limit and any peer that can be imported."""
