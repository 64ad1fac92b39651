"""The samplers as their papers print them, in the papers' coordinates: what the project's samplers are held against.

Nothing here is shared with the package. Variance-preserving papers write x_t = alpha_t x0 + sigma_t eps; with the
project's noise level s, alpha_t = 1 / sqrt(1 + s²), sigma_t = s / sqrt(1 + s²) and lambda_t = log(alpha_t / sigma_t).
Every function takes `denoise(x, s) -> x0_hat` in x = x0 + s n, a start x, the levels and an iterator of noise, and
gives the list of states after each step, in x = x0 + s n again.
"""

import math
from itertools import pairwise

import numpy as np
import torch


def alpha(s):
    return 1 / math.sqrt(1 + s * s)


def sigma(s):
    return s * alpha(s)


def lam(s):
    return math.log(alpha(s) / sigma(s))


def to_ve(y, s):
    return y / alpha(s)


def ddpm(denoise, x, levels, noises, variance="posterior", scale=1.0, noise_until=None, v=None):
    """Ho 2020: the mean by eq. 7 and eq. 11, which must agree; variances of section 3.2; v of Nichol 2021, eq. 15."""
    y, states = alpha(levels[0]) * x, []
    for step, (s, s_prev) in enumerate(pairwise(levels)):
        abar, abar_prev = alpha(s) ** 2, alpha(s_prev) ** 2
        beta = 1 - abar / abar_prev
        x = to_ve(y, s)
        x0 = denoise(x, s)
        eps = (y - math.sqrt(abar) * x0) / math.sqrt(1 - abar)
        mean = (y - beta / math.sqrt(1 - abar) * eps) / math.sqrt(1 - beta)
        weight_x0 = math.sqrt(abar_prev) * beta / (1 - abar)
        weight_y = math.sqrt(1 - beta) * (1 - abar_prev) / (1 - abar)
        torch.testing.assert_close(mean, weight_x0 * x0 + weight_y * y, rtol=1e-6, atol=1e-6 * float(mean.abs().max()))
        beta_tilde = (1 - abar_prev) / (1 - abar) * beta
        y = mean
        if s_prev > 0 and (noise_until is None or step < noise_until):
            if variance == "learned":
                share = v(x, s)
                log_variance = share * math.log(beta) + (1 - share) * math.log(beta_tilde)
                deviation = (log_variance / 2).exp()
            else:
                deviation = math.sqrt({"posterior": beta_tilde, "beta": beta}[variance])
            y = mean + math.sqrt(scale) * deviation * next(noises)
        states.append(to_ve(y, s_prev))
    return states


def ddim(denoise, x, levels, noises, eta=0.0, clip=None):
    """Song 2021 (DDIM), eq. 12 with the standard deviation of eq. 16; abar is their alpha. Only x0 is clipped."""
    y, states = alpha(levels[0]) * x, []
    for s, s_prev in pairwise(levels):
        abar, abar_prev = alpha(s) ** 2, alpha(s_prev) ** 2
        x0 = denoise(to_ve(y, s), s)
        eps = (y - math.sqrt(abar) * x0) / math.sqrt(1 - abar)
        x0 = x0 if clip is None else x0.clamp(-clip, clip)
        std = 0.0
        if eta:
            std = eta * math.sqrt((1 - abar_prev) / (1 - abar)) * math.sqrt(1 - abar / abar_prev)
        y = math.sqrt(abar_prev) * x0 + math.sqrt(1 - abar_prev - std**2) * eps
        if std > 0:
            y = y + std * next(noises)
        states.append(to_ve(y, s_prev))
    return states


def edm(denoise, x, levels, noises, heun=True, S_churn=0.0, S_tmin=0.0, S_tmax=math.inf, S_noise=1.0):
    """Karras 2022, algorithm 2; without its lines 9 to 11 it is Euler's method."""
    states, N = [], len(levels) - 1
    for t, t_next in pairwise(levels):
        gamma = min(S_churn / N, math.sqrt(2) - 1) if S_tmin <= t <= S_tmax else 0.0
        t_hat = t + gamma * t
        if gamma > 0:
            x = x + math.sqrt(t_hat**2 - t**2) * S_noise * next(noises)
        d = (x - denoise(x, t_hat)) / t_hat
        x_next = x + (t_next - t_hat) * d
        if heun and t_next != 0:
            d_prime = (x_next - denoise(x_next, t_next)) / t_next
            x_next = x + (t_next - t_hat) * (d / 2 + d_prime / 2)
        x = x_next
        states.append(x)
    return states


def flow_euler(denoise, x, levels, noises):
    """Liu 2023: z_t = (1 - t) x0 + t n with velocity v = E[n - x0], by Euler's method in t."""
    times = [s / (1 + s) for s in levels]
    z, states = (1 - times[0]) * x, []
    for t, t_next in pairwise(times):
        x0 = denoise(z / (1 - t), t / (1 - t))
        n = (z - (1 - t) * x0) / t
        z = z + (t_next - t) * (n - x0)
        states.append(z / (1 - t_next))
    return states


def dpmpp_2s(denoise, x, levels, noises, eta=0.0, r=0.5):
    """Lu 2022 (DPM-Solver++), algorithm 1, to the lower level of an ancestral step, then fresh noise up again."""
    states = []
    for s, s_next in pairwise(levels):
        up = eta * math.sqrt(s_next**2 * (s**2 - s_next**2) / s**2) if eta else 0.0
        down = math.sqrt(s_next**2 - up**2)
        y, model = alpha(s) * x, denoise(x, s)
        if down == 0:
            y = model
        else:
            h = lam(down) - lam(s)
            lambda_mid = lam(s) + r * h
            mid = math.exp(-lambda_mid)
            u = sigma(mid) / sigma(s) * y - alpha(mid) * math.expm1(-r * h) * model
            D = (1 - 1 / (2 * r)) * model + 1 / (2 * r) * denoise(to_ve(u, mid), mid)
            y = sigma(down) / sigma(s) * y - alpha(down) * math.expm1(-h) * D
        x = to_ve(y, down)
        if up > 0:
            x = x + up * next(noises)
        states.append(x)
    return states


def dpmpp_2m(denoise, x, levels, noises, sde=False):
    """Lu 2022 (DPM-Solver++), algorithm 2, or its SDE form; the first step and one to level 0 are first-order."""
    states, models, hs = [], [], []
    y = alpha(levels[0]) * x
    for s, t in pairwise(levels):
        models.append(denoise(to_ve(y, s), s))
        if t == 0:
            states.append(models[-1])
            continue
        h = lam(t) - lam(s)
        difference = 0.0
        if hs:
            difference = (models[-1] - models[-2]) / (hs[-1] / h)
        if sde:
            decay = -math.expm1(-2 * h)
            y = sigma(t) / sigma(s) * math.exp(-h) * y + alpha(t) * decay * (models[-1] + difference / 2)
            y = y + sigma(t) * math.sqrt(decay) * next(noises)
        else:
            y = sigma(t) / sigma(s) * y - alpha(t) * math.expm1(-h) * (models[-1] + difference / 2)
        hs.append(h)
        states.append(to_ve(y, t))
    return states


def exponential_adams(y, s, t, nodes, single=None):
    """Integrates (sigma_t / sigma_s) y + sigma_t * integral of e^lambda x0(lambda) over the interpolating polynomial.

    `nodes` are (level, x0_hat); `single` gives the weight B(h) / 2 that Zhao 2023 take where there is one difference.
    """
    h = lam(t) - lam(s)
    base = next(model for level, model in nodes if level == s)
    result = sigma(t) / sigma(s) * y - alpha(t) * math.expm1(-h) * base
    others = [(lam(level), model) for level, model in nodes if level != s]
    if single is not None and len(others) == 1:
        (node, model), B = others[0], {"bh1": -h, "bh2": math.expm1(-h)}[single]
        return result - alpha(t) * B / 2 * (model - base) / ((node - lam(s)) / h)
    points, weights = np.polynomial.legendre.leggauss(24)
    points = lam(s) + h * (points + 1) / 2
    for node, model in others:
        lagrange = (points - lam(s)) / (node - lam(s))
        for other, _ in others:
            if other != node:
                lagrange = lagrange * (points - other) / (node - other)
        integral = float((weights * h / 2 * np.exp(points - lam(t)) * lagrange).sum())
        result = result + alpha(t) * integral * (model - base)
    return result


def unipc(denoise, x, levels, noises, order=2, variant="bh2"):
    """Zhao 2023 (UniPC), algorithms 1 and 2 with data prediction: UniP-p, then UniC-p with the output at its end.

    Where their linear system has more than one unknown, its solution integrates the polynomial through all nodes.
    """
    states, nodes, N, p = [], [], len(levels) - 1, 1
    y = y_start = alpha(levels[0]) * x
    for step, (s, t) in enumerate(pairwise(levels)):
        model = denoise(to_ve(y, s), s)
        if step > 0:
            y = exponential_adams(y_start, nodes[-1][0], s, [*nodes[-p:], (s, model)], variant)
            states[-1] = to_ve(y, s)
        nodes.append((s, model))
        p = min(order, len(nodes), N - step) if levels[-1] == 0 else min(order, len(nodes))
        y_start = y
        y = model if t == 0 else exponential_adams(y, s, t, nodes[-p:], variant)
        states.append(to_ve(y, t))
    return states


def consistency(denoise, x, levels, noises):
    """Song 2023 (consistency models), algorithm 1 with epsilon 0: a sample, noise of level tau, a sample again."""
    states = []
    for s, tau in pairwise(levels):
        x = denoise(x, s)
        states.append(x if tau == 0 else x + math.sqrt(tau**2) * next(noises))
        x = states[-1]
    return states
