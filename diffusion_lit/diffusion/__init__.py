"""The mathematics of diffusion, in the coordinates x = x0 + sigma * n; torch only."""
