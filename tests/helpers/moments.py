"""Samplers as affine maps."""

import torch


def sampler_map(sampler, denoiser, sigmas, size, **options):
    """c, A and (B_1, B_2, ...) of a sampler, by feeding it basis vectors: one row of a batch for each."""
    draws = []

    def count(x):
        draws.append(None)
        return torch.zeros_like(x)

    sampler(denoiser, torch.zeros(1, 1, 1, size, dtype=torch.float64), sigmas, noise=count, **options)
    columns = 1 + size * (1 + len(draws))
    x = torch.zeros(columns, 1, 1, size, dtype=torch.float64)
    x[1 : 1 + size, 0, 0] = torch.eye(size, dtype=torch.float64)
    step = iter(range(1, 1 + len(draws)))

    def noise(x):
        first, n = 1 + size * next(step), torch.zeros_like(x)
        n[first : first + size, 0, 0] = torch.eye(size, dtype=torch.float64)
        return n

    out = sampler(denoiser, x, sigmas, noise=noise, **options)[:, 0, 0]
    return out[0], [(part - out[0]).T for part in out[1:].split(size)]
