"""Photographs by the shipped configs, both stages: crops, cached latents, and samples that are no squares."""

import numpy as np
import pytest
from helpers.configs_tools import CONFIGS, write_images
from helpers.runs import NO_IMAGES, read, stopped

SMALL = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
SMALL += ["--model.init_args.net.init_args.model_channels=8", "--data.init_args.batch_size=4", "--trainer.max_steps=1"]


@pytest.mark.medium
@pytest.mark.parametrize(("size", "channels"), [(128, 8), (256, 4)])
def test_both_stages_and_wide_samples(lightning, tmp_path, capsys, size, channels):
    """With all their images at 128 pixels, where one photograph is held out; at 256, which takes long, without."""
    images = [] if size == 128 else ["--trainer.callbacks=[]", *NO_IMAGES]
    root = f"--data.init_args.root={write_images(tmp_path / 'images', count=8, size=2 * size)}"
    cache = f"--data.init_args.cache_dir={tmp_path / 'cache'}"
    first, second = f"vae_landscapes_{size}", f"latent_landscapes_{size}"
    lightning("fit", "--config", CONFIGS / f"{first}.yaml", *SMALL, *images, root, cache, "--data.init_args.crops=1")
    more = ["--model.init_args.cache_dir=latents", "--data.init_args.crops=1"]
    lightning("fit", "--config", CONFIGS / f"{second}.yaml", *SMALL, *images, root, cache, *more)
    held = [path.stat().st_size for path in (tmp_path / "latents").glob("*/moments.f32")]
    assert max(held) == 2 * 12 * 2 * channels * (size // 8) ** 2 * 4  # mirrored: 6 images of 2 squares, mean, std
    if size == 128:
        for run, drawn in ((first, ("reconstructions", "interpolations")), (second, ("samples", "interpolations"))):
            assert all(list((tmp_path / "runs" / run / "version_0" / one).glob("*.png")) for one in drawn), run
    checkpoint = f"runs/{second}/version_0/checkpoints/last.ckpt"
    assert read(checkpoint)["hyper_parameters"]["net"]["init_args"]["augment_dim"] == 1
    draw = ["sample", "--ckpt_path", checkpoint, "--num_samples=2", "--num_steps=2", "--out=o"]
    lightning(*draw, f"--size={size}x{size * 3 // 2}")
    assert np.load("o/samples.npz")["arr_0"].shape == (2, size, size * 3 // 2, 3)
    assert "sides that divide by" in stopped(capsys, lightning, *draw, f"--size={size}x{size + 8}")
    assert "'wide'; give height and width" in stopped(capsys, lightning, *draw, "--size=wide")
    vae = ["sample", "--ckpt_path", f"runs/{first}/version_0/checkpoints/last.ckpt", "--num_samples=2", "--out=o"]
    assert "a VAE draws one size alone" in stopped(capsys, lightning, *vae, "--size=128x192")
