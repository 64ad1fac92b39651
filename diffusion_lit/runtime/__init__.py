"""The machine that a run computes on: devices and precision, ranks, where it writes, what an error means in words."""
