"""`diffusion-lit evaluate`, through the command in this process, on a digits model trained for three steps."""

import errno
import json
import multiprocessing
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity
from helpers.evaluation_tools import Tiny, tiny_weights
from PIL import Image

CONFIG = Path(__file__).resolve().parents[2] / "configs/edm_digits.yaml"
NO_EMA = "as trained"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a checkpoint whose average is far from its raw weights."""
    from diffusion_lit.commands.main import main

    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        main(
            [
                *["fit", "--config", str(CONFIG), "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"],
                *["--trainer.enable_model_summary=false", "--trainer.callbacks=[]", "--trainer.max_steps=3"],
                *["--model.init_args.net.init_args.model_channels=16", "--model.init_args.sampling.num_steps=2"],
                *["--data.init_args.batch_size=16", "--sample_grid.every=0", "--trajectory.every=0"],
                "--trainer.limit_val_batches=2",
                *[
                    "--loss_by_noise_level.batches=0",
                    "--ema.decay=0.7",
                    "--model.init_args.optimizer.init_args.lr=0.05",
                ],
            ]
        )
    shutil.copy(folder / "runs/edm_digits/version_0/checkpoints/last.ckpt", folder / "model.ckpt")
    return folder


@pytest.fixture
def evaluate(lightning, trained, tmp_path, monkeypatch):
    """Runs the command and returns the report."""
    monkeypatch.setenv("DIFFUSION_LIT_CACHE", str(trained / "cache"))

    def run(*options, out="report.json", ckpt=trained / "model.ckpt", samples=40):
        given = [f"--num_samples={samples}", "--accelerator=cpu", "--out", tmp_path / out]
        lightning("evaluate", "--ckpt_path", ckpt, *given, *options)
        return json.loads((tmp_path / out).read_text())

    return run


def figures(report, name="train", result=0):
    found = report["results"][result]["references"][name]["figures"]
    return {key: value["blocks"] for key, value in found.items()}


def without_run(report):
    return {key: value for key, value in report.items() if key != "run"}


def assert_same(first, second, rel=1e-5):
    assert first.keys() == second.keys()
    for name, blocks in first.items():
        assert blocks == pytest.approx(second[name], rel=rel, abs=1e-6), name


def pixels(folder):
    return np.stack([np.asarray(Image.open(path)).astype(int) for path in sorted(Path(folder).glob("*.png"))])


@pytest.mark.medium
def test_the_receipt_holds_what_would_change_a_figure(evaluate, trained, tmp_path):
    report = evaluate("--extractor=classifier", "--reference=train,test", "--seed=5", "--per_class")
    assert report["checkpoint"]["weights"] == "average (EMA)"
    assert len(report["checkpoint"]["sha256"]) == 64
    assert report["checkpoint"]["step"] == 3
    assert report["samples"]["seeds"] == [5, 124]
    assert "training frequencies 0.098817" in report["samples"]["labels"]
    assert report["extractor"]["metric"] == "fd_classifier"
    assert len(report["extractor"]["weights_sha256"]) == 64
    for name, count in (("train", 1437), ("test", 360)):
        record = report["references"][name]["record"]
        assert (record["split"], record["count"], record["image_shape"]) == (name, count, [1, 8, 8])
        assert len(record["fingerprint"]) == 64
        assert report["references"][name]["floor"]["count"] == 40
    (result,) = report["results"]
    assert result["sampling"]["sampler"] == "heun"
    assert (result["nfe"], result["network_forwards"]) == (3, 3)
    assert {"torch", "torch-fidelity", "lightning", "diffusion-lit", "python"} <= report["versions"].keys()
    found = result["references"]["train"]["figures"]
    assert set(found) == {
        f"{name}_classifier" for name in ("fd", "kd", "precision", "recall", "density", "coverage", "mind", "isc")
    }
    for value in found.values():
        assert len(value["blocks"]) == 3
        assert value["mean"] == pytest.approx(np.mean(value["blocks"]))
        assert value["std"] == pytest.approx(np.std(value["blocks"], ddof=1))
        assert value["min"] == min(value["blocks"])
    assert list(result["per_class"]["train"]) == [str(digit) for digit in range(10)]
    assert sum(entry["generated"] for entry in result["per_class"]["train"].values()) == 120
    assert sum(entry["reference"] for entry in result["per_class"]["test"].values()) == 360
    assert any("40 images against 64 features" in warning for warning in report["warnings"])

    page = (tmp_path / "report.md").read_text()
    for words in ("fd_classifier_40", "real against real, n = 40", "± ", "fd_classifier of each class", "## Warnings"):
        assert words in page
    assert not (tmp_path / "report.parts").exists()


@pytest.mark.medium
def test_ranks_and_batch_sizes_change_nothing(evaluate, tmp_path):
    options = ["--extractor=pixels", "--num_steps=2", "--samples=30"]
    options = ["--extractor=pixels", "--num_steps=2"]
    expected = evaluate(*options, "--save_samples=one", out="one.json")
    images = pixels(tmp_path / "one")
    assert images.shape == (120, 8, 8)
    for batch_size, devices in ((1, 1), (7, 1), (64, 2), (7, 4)):
        name = f"{batch_size}_{devices}"
        more = [f"--batch_size={batch_size}", f"--devices={devices}", "--strategy=ddp_fork", f"--save_samples={name}"]
        report = evaluate(*options, *more, out=f"{name}.json")
        assert_same(figures(report), figures(expected))
        assert np.abs(pixels(tmp_path / name) - images).max() <= 1  # a value on the edge between two levels
        assert report["run"]["ranks"] == devices


@pytest.mark.medium
def test_the_average_weights_are_measured(evaluate, trained, tmp_path):
    content = torch.load(trained / "model.ckpt", weights_only=True)
    average = content["state_dict"]
    raw = content["current_model_state"]
    assert any(not torch.equal(average[name], raw[name]) for name in average)
    content["current_model_state"] = average
    torch.save(content, tmp_path / "other_raw.ckpt")
    content["state_dict"] = raw
    torch.save(content, tmp_path / "raw.ckpt")
    options = ["--extractor=pixels", "--num_blocks=1"]
    expected = figures(evaluate(*options))
    assert_same(figures(evaluate(*options, ckpt=tmp_path / "other_raw.ckpt")), expected)
    assert figures(evaluate(*options, ckpt=tmp_path / "raw.ckpt"))["fd_pixels"] != pytest.approx(
        expected["fd_pixels"], rel=1e-3
    )
    content.pop("current_model_state")
    torch.save(content, tmp_path / "plain.ckpt")
    assert NO_EMA in evaluate(*options, ckpt=tmp_path / "plain.ckpt")["checkpoint"]["weights"]


def kill_after(batches):
    """Ends the process, without a word, after so many batches of samples."""
    from diffusion_lit.modules.base import DiffusionModule

    original, done = DiffusionModule.generate, []

    def generate(self, *args, **kwargs):
        done.append(1)
        if len(done) > batches:
            os._exit(9)
        return original(self, *args, **kwargs)

    DiffusionModule.generate = generate


def killed(options):
    kill_after(4)
    from diffusion_lit.commands.main import main

    main(options)


@pytest.mark.medium
def test_killed_and_started_again_it_gives_the_same_report(evaluate, trained, tmp_path, monkeypatch):
    options = ["--extractor=pixels", "--batch_size=16", "--memorization", "--sampler=heun,ddim"]
    expected = evaluate(*options, out="whole.json")
    again = ["evaluate", "--ckpt_path", str(trained / "model.ckpt"), "--num_samples=40", "--accelerator=cpu", *options]
    process = multiprocessing.get_context("fork").Process(
        target=killed, args=([*again, "--out", str(tmp_path / "cut.json")],)
    )
    process.start()
    process.join(120)
    assert process.exitcode == 9
    assert not (tmp_path / "cut.json").exists()
    assert len(list((tmp_path / "cut.parts").rglob("*.safetensors"))) == 4
    drawn = []
    from diffusion_lit.modules.base import DiffusionModule

    original = DiffusionModule.generate
    monkeypatch.setattr(
        DiffusionModule, "generate", lambda self, seeds, *a, **k: drawn.extend(seeds) or original(self, seeds, *a, **k)
    )
    report = evaluate(*options, out="cut.json")
    assert len(drawn) == 2 * 120 - 4 * 16
    # the names of the images differ with that of the report
    assert json.dumps(without_run(report)).replace("cut.", "whole.") == json.dumps(without_run(expected))
    assert not (tmp_path / "cut.parts").exists()


@pytest.mark.medium
def test_several_settings_give_a_table_and_a_plot(evaluate, tmp_path, trained, monkeypatch):
    opened, before = [], Path.open
    monkeypatch.setattr(
        Path, "open", lambda path, *mode, **more: opened.append(path.name) or before(path, *mode, **more)
    )
    shutil.copy(trained / "model.ckpt", tmp_path / "once.ckpt")
    time.sleep(0.11)  # a file that changed just now is read again
    report = evaluate(
        "--extractor=pixels",
        "--sampler=heun,ddim",
        "--num_steps=2,3",
        "--cfg_scale=1,2",
        "--labels=all",
        ckpt=tmp_path / "once.ckpt",
    )
    assert opened.count("once.ckpt") == 2  # read once, hashed once
    assert len(report["results"]) == 8
    found = {
        (one["sampling"]["sampler"], one["sampling"]["num_steps"], one["sampling"]["cfg_scale"]): one
        for one in report["results"]
    }
    assert found["heun", 3, 1.0]["nfe"] == 5
    assert found["ddim", 3, 1.0]["network_forwards"] == 3
    assert found["ddim", 3, 2.0]["network_forwards"] == 6  # guidance evaluates both branches
    values = [one["references"]["train"]["figures"]["fd_pixels"]["mean"] for one in report["results"]]
    assert len(set(values)) == 8
    assert report["samples"]["labels"].startswith("as given, all")
    assert Image.open(tmp_path / "report.png").size[0] > 300
    assert (tmp_path / "report.md").read_text().count("| heun, 3 steps, cfg 2 | 5 |") == 1


def test_kept_images_given_to_torch_fidelity_have_the_same_figures(evaluate, tmp_path, monkeypatch):
    from datamodules import Digits
    from diffusion_lit.evaluation.generation import save_pngs

    weights = tiny_weights(tmp_path / "tiny.pth")
    monkeypatch.setattr("diffusion_lit.commands.evaluate_run.make_extractor", lambda *args: Tiny(str(weights)))
    report = evaluate("--num_blocks=1", "--save_samples=kept", "--reference=test")
    real = Digits().reference_images("test")
    save_pngs(real, range(len(real)), tmp_path / "real")
    theirs = torch_fidelity.calculate_metrics(
        input1=str(tmp_path / "kept"),
        input2=str(tmp_path / "real"),
        **{"fid": True, "kid": True, "prc": True, "isc": True, "cuda": False, "verbose": False, "save_cpu_ram": True},
        **{"feature_extractor": "tiny", "feature_extractor_weights_path": str(weights), "kid_subset_size": 40},
    )
    ours = {name: blocks[0] for name, blocks in figures(report, "test").items()}
    for name, theirs_name in (
        ("fd_tiny", "frechet_inception_distance"),
        ("kd_tiny", "kernel_inception_distance_mean"),
        ("precision_tiny", "precision"),
        ("recall_tiny", "recall"),
        ("isc_tiny", "inception_score_mean"),
    ):
        assert ours[name] == pytest.approx(theirs[theirs_name], rel=1e-4), name


@pytest.mark.medium
def test_a_file_as_reference_is_named_in_the_receipt(evaluate, tmp_path):
    from datamodules import Digits

    np.savez(tmp_path / "batch.npz", arr_0=Digits().reference_images("train").permute(0, 2, 3, 1).numpy())
    report = evaluate("--extractor=pixels", f"--reference=train,{tmp_path / 'batch.npz'}", "--num_blocks=1")
    assert_same(figures(report, "train"), figures(report, str(tmp_path / "batch.npz")))
    record = report["references"][str(tmp_path / "batch.npz")]["record"]
    assert (record["file"], record["used"], record["count"]) == ("batch.npz", "arr_0", 1437)


@pytest.mark.medium
def test_memorisation_and_likelihood_are_in_the_report(evaluate, tmp_path):
    report = evaluate("--extractor=pixels", "--memorization", "--likelihood", "--likelihood_images=3", "--num_blocks=1")
    found = report["results"][0]["memorization"]
    assert (found["samples"], found["training"], found["held_out"]) == (40, 1437, 360)
    assert found["memorised"] is False
    assert Image.open(tmp_path / "report.memorization_heun_2_1_pixels.png").size[0] > 100
    likelihood = report["likelihood"]
    assert likelihood["count"] == 3
    assert 0 < likelihood["bits_per_dim"] < 100
    assert likelihood["labels"] == "each image's own class"
    assert "bits per dimension" in (tmp_path / "report.md").read_text()


def refused(capsys, run, *args):
    with pytest.raises(SystemExit) as caught:
        run(*args)
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


def test_what_cannot_be_measured_is_refused_before_anything_is_generated(evaluate, capsys, monkeypatch, tmp_path):
    from diffusion_lit.modules.base import DiffusionModule

    monkeypatch.setattr(DiffusionModule, "generate", lambda *args, **kwargs: pytest.fail("a sample was drawn"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def offline(*args, **kwargs):
        raise OSError("no internet")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    np.savez(tmp_path / "big.npz", arr_0=np.zeros((3, 16, 16, 1), dtype=np.uint8))
    np.savez(tmp_path / "edm.npz", mu=np.zeros(2048), sigma=np.eye(2048, dtype=np.float32))
    for options, words in (
        (["--extractor=inception"], "could not be downloaded"),
        (["--extractor=inception", "--extractor_weights=no.pth"], "There is no file no.pth"),
        (["--extractor=resnet"], "There is no extractor 'resnet'"),
        (["--extractor=pixels", "--reference=validation"], "no split 'validation'"),
        (["--extractor=pixels", f"--reference={tmp_path / 'big.npz'}"], "resize"),
        (["--extractor=pixels", f"--reference={tmp_path / 'edm.npz'}"], "Inception's features"),
        (["--extractor=pixels", "--num_steps=2,x"], "--num_steps 2,x is not a list"),
        (["--extractor=pixels", "--sampler=nosuch"], "nosuch"),
        (["--extractor=pixels", "--labels=77"], "77"),
        (["--extractor=pixels", "--out=report.txt"], "must end in .json"),
        (["--extractor=pixels", "--num_samples=1"], "num_samples is 1"),
        (["--extractor=pixels", "--devices=2", "--strategy=magic"], "no strategy 'magic'"),
    ):
        assert words in refused(capsys, evaluate, *options), options


def test_data_of_another_size_are_refused(evaluate, capsys, idx_folder):
    options = ["--data=datamodules.MNIST", f"--data.root={idx_folder}", "--data.val_size=20", "--extractor=pixels"]
    assert "evaluate against data of the same size" in refused(capsys, evaluate, *options)


def test_help_lists_samplers_and_options(lightning, capsys):
    with pytest.raises(SystemExit) as caught:
        lightning("evaluate", "--help")
    assert caught.value.code == 0
    said = capsys.readouterr().out
    for words in ("--memorization", "--reference", "dpmpp_2m", "real-against-real"):
        assert words in said


def test_two_evaluations_never_share_a_report(evaluate, tmp_path, capsys):
    from helpers.runs import stopped

    from diffusion_lit.runtime.lock import Lock

    with Lock(tmp_path / "report.parts" / "lock"):
        said = stopped(capsys, evaluate, "--extractor=pixels", "--num_blocks=1")
    assert (
        f"(process {os.getpid()} on " in said
        and f") is writing to {tmp_path / 'report.json'}" in said
        and "another --out" in said
    )
    assert not (tmp_path / "report.json").exists()
    evaluate("--extractor=pixels", "--num_blocks=1", "--num_steps=1")
    assert not (tmp_path / "report.parts").exists()


@pytest.mark.medium
def test_a_cache_that_cannot_be_written_changes_no_figure(evaluate, tmp_path, monkeypatch):
    options = ["--extractor=classifier", "--num_blocks=1", "--num_steps=1"]
    expected = evaluate(*options)
    from diffusion_lit.storage import tensors as store

    original = store.atomic

    def full(path):
        if path.is_relative_to(tmp_path / "full"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(path)

    monkeypatch.setattr(store, "atomic", full)
    monkeypatch.setattr(store, "_IN_MEMORY", {})
    monkeypatch.setenv("DIFFUSION_LIT_CACHE", str(tmp_path / "full"))
    with pytest.warns(UserWarning, match="goes on from memory.*No space left"):
        found = evaluate(*options)
    assert figures(found) == figures(expected)
    assert without_run(found)["extractor"] == without_run(expected)["extractor"]
    assert len(store._IN_MEMORY) == 3  # the classifier, and the features of two splits


@pytest.mark.medium
def test_figures_are_printed_as_a_table_or_as_json(evaluate, capsys, tmp_path):
    few = ["--extractor=pixels", "--num_blocks=1", "--num_steps=1"]
    capsys.readouterr()
    report = evaluate(*few)
    said = capsys.readouterr().out
    value = figures(report)["fd_pixels"][0]
    assert f"{value:.4g}" in said and "warning: 1 block of samples" in said and str(tmp_path / "report.md") in said
    figures_of = next(line.split() for line in said.splitlines() if line.startswith("fd_pixels "))
    assert f"{value:.4g}" in figures_of and max(map(len, said.split("warning")[0].splitlines())) <= 100  # of a terminal
    evaluate(*few, "--json")
    assert without_run(json.loads(capsys.readouterr().out)) == without_run(report)


@pytest.mark.medium
def test_options_of_guidance_that_do_nothing_are_refused(evaluate, capsys):
    from helpers.runs import stopped

    few = ["--extractor=pixels", "--num_blocks=1", "--guidance_interval=[0.3, 5]"]
    assert "does nothing at cfg_scale 1" in stopped(capsys, evaluate, *few)
    evaluate(*few, "--cfg_scale=1,2", "--num_steps=1")
