"""The machine that a run computes on: devices, precision, ranks, its folder, and error messages."""
