"""The plumbing of studies of sampling, architecture and memorisation, on networks of a few weights, and their sums."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from scipy.fft import dctn

from datamodules import Digits, Subset
from diffusion_lit.modules.load import load_module
from diffusion_lit.storage.checkpoints import read_checkpoint
from experiments.attention_ablation import attention_ablation
from experiments.capacity import capacity
from experiments.coarse_first import coarse_first, level_of, summary
from experiments.cold_diffusion import cold_diffusion
from experiments.few_steps import few_steps, levels
from experiments.guidance_scale import guidance_scale
from experiments.harness import runs
from experiments.harness.frequencies import band_edges, band_masks, band_power, settled, tile_mean
from experiments.harness.networks import cost, step_cost
from experiments.harness.study import QUIET, main
from experiments.memorization import memorization
from experiments.metrics import metrics
from experiments.warm_start import warm_start

TINY = {
    **QUIET,
    "trainer.max_steps": 2,
    "trainer.accelerator": "cpu",
    "trainer.enable_progress_bar": False,
    "trainer.enable_model_summary": False,
    "loss_by_noise_level.batches": 0,
    "trainer.limit_val_batches": 2,
    "model.init_args.net.init_args.model_channels": 8,
    "data.init_args.batch_size": 32,
}


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Runs a study in an empty folder, its trainings in this process, measured by pixels."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("experiments.harness.show.DPI", 40)
    trained = []

    def here(self, command, **options):
        from diffusion_lit.commands.main import main as lightning

        trained.append(command[-1])
        lightning([str(word) for word in command[len(runs.COMMAND) :]])
        return 0

    monkeypatch.setattr(runs.Children, "run", here)

    def run(function, *args, config="configs/edm_digits.yaml", options=TINY):
        made = main(
            function,
            config,
            dict(options),
            [*args, "--extractor=pixels", "--num_samples=40", "--batch_size=40", "--device=cpu"],
        )
        made.count = len(trained)
        record = json.loads((made.folder / "study.json").read_text())
        assert record["findings"] and not record["failed"]
        for figure in record["figures"]:
            assert (made.folder / figure["file"]).stat().st_size > 1000
        assert (made.folder / "index.html").exists()
        return made

    return run


def table(made, name):
    with (made.folder / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.medium
def test_guidance(study):
    made = study(guidance_scale, "--scales=[0, 1, 3]", "--num_steps=2")
    rows = {row["guidance"]: row for row in table(made, "quality")}
    names = ["scale 0", "scale 1", "scale 3", "scale 5 for 0.2 < sigma <= 3", "autoguidance 2", "scale per class"]
    assert list(rows) == names
    # heun with 2 steps calls the denoiser 3 times; guidance doubles the forwards where it acts
    assert [float(rows[name]["forwards"]) for name in names[:3]] == [3, 3, 6]
    assert float(rows["autoguidance 2"]["forwards"]) == 6
    assert {float(row["scale"]) for row in table(made, "per_class")} <= {0.0, 1.0, 3.0}
    before = made.count
    again = study(guidance_scale, "--scales=[0, 1, 3]", "--num_steps=2")
    assert again.count == before  # nothing is trained twice
    assert table(again, "quality") == table(made, "quality")


@pytest.mark.medium
def test_few_steps(study):
    made = study(few_steps, "--nfe=[1, 2, 4]", "--samplers=[heun, euler]", "--cfg_scale=1")
    rows = table(made, "quality")
    assert [(row["model"], int(row["NFE"])) for row in rows] == [
        (m, n) for m in ("teacher", "tuned", "meanflow") for n in (1, 2, 4)
    ]
    assert all(int(row["steps"]) == int(row["NFE"]) for row in rows if row["sampler"] != "heun")
    assert [row["sampler"] for row in rows[3:]] == ["consistency"] * 3 + ["meanflow"] * 3
    assert {"kd_pixels", "fd_pixels", "precision", "recall"} <= rows[0].keys()
    steps = {name: int(run.run.options["trainer.max_steps"]) for name, run in made.trained.items()}
    assert steps["half"] + steps["tuned"] == steps["teacher"] == steps["meanflow"] == 2
    default = load_module(made.trained["tuned"].ckpt_path).sampling
    assert levels(1, 5.0, 0.2, default) == [80.0]
    assert levels(2, 5.0, 0.2, default) == [80.0, 0.8]
    assert levels(4, 5.0, 0.2, default) == pytest.approx([80.0, 5.0, 1.0, 0.2])


@pytest.mark.medium
def test_coarse_first(study):
    made = study(coarse_first, "--num_steps=5")
    assert [row["cycles per image"] for row in table(made, "bands")] == ["0 to 1", "1 to 2", "2 to 3", "3 to 5.66"]
    assert len(table(made, "places")) == 16


@pytest.mark.medium
def test_attention_ablation(study):
    made = study(attention_ablation, "--seconds=0")
    rows = {row["attention"]: row for row in table(made, "quality")}
    assert next(iter(rows)) == "none" and len(rows) == 6
    size = {name: float(row["parameters M"]) for name, row in rows.items()}
    assert min(size, key=size.get) == "none"
    assert size["full at 8 and 4"] == size["full at 8 and 4, more heads"] > size["full at 8"]
    kept = {name: float(row["activations MB"]) for name, row in rows.items()}
    assert min(kept, key=kept.get) == "none"


@pytest.mark.medium
def test_capacity(study):
    made = study(capacity, "--seconds=0", "--widths=[8, 16]", options={**TINY, "trainer.max_steps": 8})
    small, large = table(made, "quality")
    assert (int(small["steps"]), int(large["steps"])) == (8, 2)
    assert 3 < float(large["parameters M"]) / float(small["parameters M"]) < 4.1
    assert float(large["TFLOP in all"]) == pytest.approx(float(small["TFLOP in all"]), rel=0.2)


@pytest.mark.medium
def test_memorization(study):
    made = study(memorization, "--counts=[1, 16, null]", "--data.init_args.use_labels=false")
    rows = table(made, "copies")
    assert [int(row["training images"]) for row in rows] == [1, 16, 1437]
    assert all(int(row["extracted"]) <= int(row["copies"]) for row in rows)


@pytest.mark.medium
def test_cold_diffusion(study):
    made = study(cold_diffusion, "--degradations=Blur,Pixelate", "--blurred_steps=2", config="configs/cold_digits.yaml")
    rows = table(made, "restored")
    assert [row["restored"] for row in rows] == ["degraded", "direct", "naive", "improved"] * 2
    steps = table(made, "steps")
    assert [(row["restored"], row["steps"]) for row in steps] == [
        (way, steps) for way in ("naive", "improved") for steps in ("1", "2", "20")
    ]
    direct = next(row for row in rows if row["restored"] == "direct")
    assert float(steps[0]["fd_pixels"]) == pytest.approx(float(direct["fd_pixels"]))  # one naive step is direct


def test_bands_are_rings_of_scipys_cosine_transform_and_hold_all_but_the_mean():
    x = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    coefficients = dctn(x.double().numpy(), axes=(2, 3), norm="ortho") ** 2
    k = np.arange(8) / 2
    radius = np.sqrt(k[:, None] ** 2 + k**2)
    edges = band_edges(8, 4)
    power = band_power(x, band_masks(8, 4))
    for band in range(4):
        high = edges[band + 1] if band < 3 else np.inf
        ring = (radius > edges[band]) & (radius <= high)
        np.testing.assert_allclose(power[:, band], (coefficients * ring).sum((1, 2, 3)), rtol=1e-4)
    rest = (x - x.mean((2, 3), keepdim=True)).square().sum((1, 2, 3))
    torch.testing.assert_close(power.sum(1), rest)


def test_a_wave_is_in_the_band_of_its_frequency():
    place = (torch.arange(16) + 0.5) / 16
    wave = torch.cos(2 * math.pi * 3 * place).expand(1, 1, 16, 16)
    power = band_power(wave, band_masks(16, 8))[0]
    assert power.argmax() == 2 and power[2] / power.sum() > 0.999  # 2 to 3 cycles


def test_what_falls_has_settled_when_it_stays_below():
    errors = torch.tensor([[1.0, 0.05, 1.0], [0.05, 0.3, 0.5], [0.2, 0.05, 0.4], [0.01, 0.0, 0.3]])
    steps = settled(errors, 0.1)
    assert steps.tolist() == [3, 2, 4]
    sigmas = torch.tensor([8.0, 4.0, 2.0, 1.0])
    assert level_of(steps, sigmas).tolist() == [1, 2, 0]
    assert summary(steps, sigmas)["median step"] == 4
    tiles = tile_mean(torch.arange(16.0).reshape(1, 1, 4, 4), 2)
    assert tiles.tolist() == [[2.5, 4.5, 10.5, 12.5]]


class Line(torch.nn.Module):
    in_channels, image_size, num_classes = 1, 4, 0

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Linear(16, 16)

    def forward(self, x, noise, label=None):
        return self.weight(x.flatten(1)).square()


def test_costs_are_counted():
    net = Line()
    assert cost(net).forward == 2 * 16 * 16 and cost(net).parameters == 16 * 16 + 16
    # kept for the backward pass of 32 images: the input and what is squared, 16 floats each
    assert step_cost(net, 32, 0)["activations MB"] == pytest.approx(2 * 32 * 16 * 4 / 1e6)


def test_a_subset_repeats_its_images_and_leaves_the_rest_alone():
    whole = Digits(64)
    few = Subset(Digits(64), 3)
    few.prepare_data()
    few.setup()
    assert torch.equal(few.reference_images("train"), whole.reference_images("train")[[0, 479, 958]])
    assert torch.equal(few.reference_labels("train"), whole.reference_labels("train")[[0, 479, 958]])
    assert few.fingerprint("test") == whole.fingerprint("test") and few.image_shape == (1, 8, 8)
    loader = few.train_dataloader()
    assert len(loader) == 4098 // 64
    images = torch.cat([batch["image"] for batch in loader])
    labels = torch.cat([batch["label"] for batch in loader])
    kept = (few.reference_images("train").float() / 127.5 - 1).flatten(1)
    distance = torch.cdist(images.flatten(1), kept, compute_mode="donot_use_mm_for_euclid_dist")
    assert distance.min(1).values.max() == 0
    counts = distance.argmin(1).bincount()
    assert len(counts) == 3 and counts.min() > 1300
    assert torch.equal(labels, few.reference_labels("train")[distance.argmin(1)])
    with pytest.raises(ValueError, match="count is 0"):
        Subset(Digits(64), 0)
    with pytest.raises(ValueError, match="count is 2000, but the training split has 1437 images"):
        Subset(Digits(64), 2000).setup("fit")


@pytest.mark.medium
def test_metrics(study):
    made = study(metrics, "--counts=[10, 20]", "--draws=2", "--few_steps=1", "--noise=1.5")
    rows = {row["figure"]: row for row in table(made, "samples")}
    assert {"fd_pixels", "kd_pixels", "density_pixels", "coverage_pixels", "mind_pixels"} <= rows.keys()
    kinds = {"a quarter of the training", "1 steps", "noise of 1.5", "without class 0"}
    assert kinds < rows["fd_pixels"].keys() and made.count == 2
    assert {row[kind] for row in rows.values() for kind in kinds} <= {"10", "20", "more than 20"}


@pytest.mark.medium
def test_warm_start(study):
    made = study(warm_start, "--left_out=3", "--shares=[1.0]")
    cold, warm = table(made, "quality")
    assert made.count == 3 and (cold["steps"], warm["steps"]) == ("2", "2")
    first, nothing, started = (read_checkpoint(run.ckpt_path) for run in made.trained.values())
    assert first["diffusion_lit"]["class_names"] == list("012456789") and "init_from" not in nothing["diffusion_lit"]
    layers = started["diffusion_lit"]["init_from"]["layers"]
    assert list(layers["rows"]) == ["denoiser.net.conditioning.label"] and not layers["new"]


def test_a_subset_without_classes_numbers_the_others_anew():
    whole, part = Digits(64), Subset(Digits(64), without=["3", "0"])
    part.setup()
    assert part.class_names == ["1", "2", "4", "5", "6", "7", "8", "9"] and part.num_classes == 8
    for split in ("train", "test"):
        images, labels = whole.reference_images(split), whole.reference_labels(split)
        kept = (labels != 3) & (labels != 0)
        assert torch.equal(part.reference_images(split), images[kept])
        names = [part.class_names[label] for label in part.reference_labels(split)]
        assert names == [str(label) for label in labels[kept].tolist()]
    few = Subset(Digits(64), count=5, without=["0"])
    few.setup()
    assert len(few.reference_images("train")) == 5 and len(few.reference_images("test")) > 300
    assert len(few.train_dataloader()) > 4000 // 64
    for wrong, said in ((["ten"], "'ten'"), ([str(digit) for digit in range(10)], "leave at least one")):
        with pytest.raises(ValueError, match=said):
            Subset(Digits(64), without=wrong).setup("fit")
    with pytest.raises(ValueError, match="labels are not used"):
        Subset(Digits(64, use_labels=False), without=["3"]).setup("fit")


def test_a_run_that_goes_on_is_not_begun_again_from_other_weights(tmp_path):
    run = runs.Run("tuned", "configs/consistency_digits.yaml", {"init_from": "teacher.ckpt", "trainer.max_steps": 3})
    assert "--init_from=teacher.ckpt" in run.command(tmp_path)
    last = run.folder(tmp_path) / "version_0/checkpoints/last.ckpt"
    last.parent.mkdir(parents=True)
    last.touch()
    command = run.command(tmp_path)
    assert "--ckpt_path=last" in command and "--trainer.max_steps=3" in command
    assert not any(word.startswith("--init_from") for word in command)
