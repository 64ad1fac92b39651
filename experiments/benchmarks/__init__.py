"""What measures this project, beside others and under stress: `python -m experiments.benchmarks.NAME`."""
