"""Benchmarks of this project, beside other libraries and under stress: `python -m experiments.benchmarks.NAME`."""
