"""The comparison of samplers: equal numbers of denoiser calls, and a run from end to end on a tiny checkpoint."""

import csv
from pathlib import Path

import pytest
from PIL import Image

from diffusion_lit.diffusion import SAMPLERS, Sampling
from experiments.sampler_comparison import ALIASES, sampler_comparison, settings_of

DIGITS = Path(__file__).resolve().parents[2] / "configs/edm_digits.yaml"


@pytest.mark.parametrize("name", [name for name in SAMPLERS if SAMPLERS[name].nfe(1) is not None])
def test_a_sampler_takes_the_most_steps_that_the_calls_allow(name):
    settings = settings_of(Sampling(), name, nfe=[1, 5, 9, 17, 35], rtol=[])
    for setting, most in zip(reversed(settings), (35, 17, 9, 5, 1), strict=False):
        assert setting.nfe <= most < SAMPLERS[name].nfe(setting.num_steps + 1)


def test_an_adaptive_sampler_goes_by_its_tolerances():
    loose, tight = settings_of(Sampling(), "rk45", nfe=[5], rtol=[0.1, 0.01])
    assert (loose.sampler_options["rtol"], tight.sampler_options["rtol"]) == (0.1, 0.01)
    assert loose.num_steps == 2  # to sigma_min, and to 0


@pytest.mark.medium
def test_a_run_leaves_table_and_figure_and_is_not_repeated(lightning, tmp_path):
    lightning(
        *["fit", "--config", DIGITS, "--trainer.max_steps=1", "--trainer.callbacks=[]", "--trainer.accelerator=cpu"],
        *["--model.init_args.net.init_args.model_channels=16", "--sample_grid.every=0", "--trajectory.every=0"],
        *["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"],
    )
    options = {
        "ckpt_path": str(tmp_path / "runs/edm_digits/version_0/checkpoints/last.ckpt"),
        "nfe": [3],
        "rtol": [0.5],
        "num_samples": 20,
        "extractor": "pixels",
        "out": str(tmp_path / "out"),
        "device": "cpu",
    }
    points = sampler_comparison(**options)
    assert {point.sampler for point in points} == {name for name in SAMPLERS if SAMPLERS[name].order} - set(ALIASES)
    assert all(point.nfe <= 3 for point in points if point.sampler != "rk45")
    with (tmp_path / "out/table.csv").open() as file:
        assert len(list(csv.reader(file))) == 1 + len(points)
    assert Image.open(tmp_path / "out/figure.png").size[0] > 1000
    again = sampler_comparison(**options)
    assert again == points  # the times too: nothing was drawn anew
