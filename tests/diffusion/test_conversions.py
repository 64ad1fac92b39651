"""Conversions of noise levels: exact inverses of each other, monotone, and accurate against 50-digit arithmetic."""

from decimal import Decimal, getcontext

import pytest
import torch

from diffusion_lit.diffusion import conversions as c

getcontext().prec = 50

SIGMA = torch.logspace(-4, 5, 200, dtype=torch.float64)
BETAS = torch.linspace(1e-5, 0.999, 300, dtype=torch.float64)
PAIRS = [
    (c.sigma_to_alpha_bar, c.alpha_bar_to_sigma, SIGMA[40:]),
    (c.sigma_to_log_snr, c.log_snr_to_sigma, SIGMA),
    (c.sigma_to_flow_time, c.flow_time_to_sigma, SIGMA),
    (c.sigma_to_betas, c.betas_to_sigma, SIGMA),
    (c.betas_to_alpha_bar, c.alpha_bar_to_betas, BETAS[:100]),
    (c.betas_to_sigma, c.sigma_to_betas, BETAS[:100]),
]


@pytest.mark.parametrize(("there", "back", "values"), PAIRS, ids=lambda p: getattr(p, "__name__", ""))
def test_conversions_invert_each_other(there, back, values):
    torch.testing.assert_close(back(there(values)), values, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("convert", "sign"), [(c.sigma_to_alpha_bar, -1), (c.sigma_to_log_snr, -1), (c.sigma_to_flow_time, 1)]
)
def test_conversions_are_monotone(convert, sign):
    assert bool((sign * convert(SIGMA).diff() > 0).all())


def test_table_of_a_chain_against_fifty_digits():
    betas = [Decimal("1e-4") + (Decimal("0.02") - Decimal("1e-4")) * k / 999 for k in range(1000)]
    alpha_bar, product = [], Decimal(1)
    for beta in betas:
        product *= 1 - beta
        alpha_bar.append(product)
    expected = torch.tensor([float(((1 - a) / a).sqrt()) for a in alpha_bar], dtype=torch.float64)
    table = torch.tensor([float(beta) for beta in betas], dtype=torch.float64)
    torch.testing.assert_close(c.betas_to_sigma(table), expected, rtol=1e-13, atol=0)
    expected = torch.tensor([float(a) for a in alpha_bar], dtype=torch.float64)
    torch.testing.assert_close(c.betas_to_alpha_bar(table), expected, rtol=1e-13, atol=0)


def test_known_values():
    sigma = torch.tensor([0.5, 3.0], dtype=torch.float64)
    torch.testing.assert_close(c.sigma_to_alpha_bar(sigma).tolist(), [0.8, 0.1])
    torch.testing.assert_close(c.sigma_to_flow_time(sigma).tolist(), [1 / 3, 0.75])
    torch.testing.assert_close(c.sigma_to_log_snr(sigma).exp().tolist(), [4.0, 1 / 9])
    torch.testing.assert_close(c.sigma_to_betas(sigma).tolist(), [0.2, 1 - 0.1 / 0.8])


@pytest.mark.parametrize("sigma", [1e-3, 157.0, 2e4])
@pytest.mark.parametrize("convert", [c.sigma_to_alpha_bar, c.sigma_to_log_snr, c.sigma_to_flow_time])
def test_single_precision_loses_only_rounding(convert, sigma):
    single = torch.tensor(sigma)
    torch.testing.assert_close(convert(single).double(), convert(single.double()), rtol=3e-7, atol=0)


def test_widen():
    assert float(c.widen(0.1)) == 0.1
    assert c.widen(torch.tensor(0.1, dtype=torch.bfloat16)).dtype == torch.float64
