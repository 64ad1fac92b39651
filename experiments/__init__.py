"""Studies: each is run as `python -m experiments.NAME` and leaves a table or a figure."""
