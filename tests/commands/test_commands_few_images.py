"""Evaluations of models of very few images: what is idle or cannot be measured is told before anything is drawn."""

import pytest
import torch
from helpers.configs_tools import CONFIGS, write_images
from helpers.evaluation_tools import Source
from helpers.runs import stopped

from diffusion_lit.commands.edit_options import ImageOptions
from diffusion_lit.commands.evaluate_plan import Plan
from diffusion_lit.evaluation.bits_per_dim import check_test_images
from diffusion_lit.report.receipt_page import likelihood_sentence
from diffusion_lit.report.receipt_tables import setting_name


def test_options_that_one_image_has_no_use_for_are_told():
    assert Plan(ckpt_path="a.ckpt").idle_with_one_image() == []
    (said,) = Plan(ckpt_path="a.ckpt", memorization=True).idle_with_one_image()
    assert said.endswith("--memorization does nothing.")
    (said,) = Plan(ckpt_path="a.ckpt", reference="test", per_class=True).idle_with_one_image()
    assert said.endswith("--reference, --per_class do nothing.")


def test_a_likelihood_takes_a_test_image():
    source = Source(test=1)
    check_test_images(source)
    source.images["test"] = source.images["test"][:0]
    with pytest.raises(ValueError, match="leave it out"):
        check_test_images(source)
    one = {"bits_per_dim": 3.5, "standard_error": None, "count": 1, "split": "test"}
    assert likelihood_sentence({"likelihood": one}) == "Likelihood: 3.5000 bits per dimension over 1 image of test."


def test_a_setting_of_one_step_is_named_in_the_singular():
    sampling = {"sampler": "prior", "num_steps": 1, "cfg_scale": 1.0}
    assert setting_name({"sampling": sampling, "conditional": False}) == "prior, 1 step"
    assert setting_name({"sampling": {**sampling, "num_steps": 2}, "conditional": False}) == "prior, 2 steps"


@pytest.mark.parametrize(
    ("count", "index", "words"), [(0, 0, "no test image; give --image"), (1, 1, "data_index is 1")]
)
def test_a_test_image_that_is_not_there(monkeypatch, count, index, words):
    source = Source(test=count, labels=False)
    source.prepare_data = lambda: None
    monkeypatch.setattr("diffusion_lit.commands.edit_options.load_data", lambda *given, **options: source)
    with pytest.raises(ValueError, match=words):
        ImageOptions(ckpt_path="a.ckpt", data_index=index)._test_image(torch.nn.Identity())


@pytest.mark.medium
def test_an_empty_split_is_told_by_the_commands_that_need_it(lightning, capsys, tmp_path):
    root = f"--data.init_args.root={write_images(tmp_path / 'images', count=3, size=20)}"
    data = ["--data=datamodules.Landscapes", root, "--data.init_args.batch_size=1", "--data.init_args.image_size=16"]
    data += [f"--data.init_args.cache_dir={tmp_path / 'cache'}"]
    none = ["--data.init_args.val_fraction=0", "--data.init_args.test_fraction=0"]
    run = ["--config", CONFIGS / "vae_digits.yaml", "--name=few", "--trainer.accelerator=cpu", "--trainer.callbacks=[]"]
    run += ["--model.init_args.net.init_args.model_channels=8", "--trainer.enable_progress_bar=false", *data]
    lightning("fit", *run, *none, "--trainer.max_steps=1", "--sample_grid.every=0")
    run += ["--ckpt_path=runs/few"]
    for command, split in (("validate", "val"), ("test", "test"), ("predict", "test")):
        said = stopped(capsys, lightning, command, *run, *none)
        assert f"The {split} split has no image, so that there is nothing to {command};" in said
    lightning("predict", *run)
    assert "1 sample is in runs/few/version_0/predict/" in capsys.readouterr().out
