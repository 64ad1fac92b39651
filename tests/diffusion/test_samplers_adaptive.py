"""The Dormand-Prince pair against scipy's."""

import numpy as np
import pytest
import torch
from scipy.integrate import RK45

from diffusion_lit.diffusion.samplers.adaptive import ERROR, NODES, STAGES, DormandPrince


def test_coefficients_are_scipys():
    assert np.allclose(NODES[:6], RK45.C, rtol=1e-14)
    for stage, row in zip(STAGES[:6], RK45.A, strict=True):
        assert np.allclose(stage, row[: len(stage)], rtol=1e-14)
        assert not row[len(stage) :].any()
    assert np.allclose(STAGES[6], RK45.B, rtol=1e-14)
    assert np.allclose(ERROR, -RK45.E, rtol=1e-10)  # scipy's is fourth minus fifth order


@pytest.mark.parametrize("rtol", [1e-3, 1e-6, 1e-8])
def test_a_step_and_the_next_ones_length_are_scipys(rtol):
    theirs = RK45(lambda s, y: y * np.cos(s), 0.3, [1.0, -2.0], 10.0, first_step=0.1, rtol=rtol, atol=rtol)
    theirs.step()
    start = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    ours = DormandPrince(
        lambda y, s: y * s.cos()[:, None], start, 0.3, rtol=rtol, atol=rtol, first_step=0.1, max_steps=9
    )
    ours.advance(theirs.t)
    assert ours.y[0].tolist() == pytest.approx(theirs.y.tolist(), rel=1e-13)
    assert ours.step.item() == pytest.approx(theirs.h_abs, rel=1e-6)
