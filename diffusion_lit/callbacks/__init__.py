"""Callbacks: averages of the weights, pictures and measurements while training."""
