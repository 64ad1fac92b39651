"""`diffusion-lit edit`: every task on every family from a checkpoint alone; images of every kind; what is refused."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.runs import stopped
from PIL import Image

from diffusion_lit.commands.edit import TASKS
from diffusion_lit.commands.edit_options import ImageOptions, decibels
from diffusion_lit.storage.hashing import file_hash

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FIT = [
    *["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"],
    *["--trainer.callbacks=[]", "--trainer.max_steps=2", "--data.init_args.batch_size=16"],
    *["--sample_grid.every=0", "--trajectory.every=0", "--loss_by_noise_level.batches=0"],
    "--trainer.limit_val_batches=2",
]
NET = "--model.init_args.net.init_args.model_channels=16"
STEPS = "--model.init_args.sampling.num_steps=3"
MODELS = {"edm": "edm_digits", "latent": "latent_digits", "ddpm": "ddpm_single_image_32"}
OPTIONS = {
    "forward": ["--sigmas=[0.5, 2]"],
    "denoise": ["--sigmas=[0.5, 2]", "--num_steps=3"],
    "img2img": ["--starts=[0, 2]", "--num_steps=3"],
    "invert": ["--num_steps=3"],
    "inpaint": ["--num_samples=2", "--resamplings=2"],
    "anagram": ["--num_samples=2"],
    "hybrid": ["--num_samples=2"],
    "interpolate": ["--num_frames=3"],
    "guidance": ["--cfg_scales=[1, 3]"],
    "colorize": ["--num_samples=1", "--resamplings=1"],
    "super_resolve": ["--num_samples=1", "--resamplings=1"],
    "deblur": ["--num_samples=1", "--resamplings=1"],
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a tiny model of each family, trained for two steps."""
    from diffusion_lit.commands.main import main

    folder = tmp_path_factory.mktemp("edit")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(["fit", "--config", str(CONFIGS / "edm_digits.yaml"), *FIT, NET, STEPS])
        main(["fit", "--config", str(CONFIGS / "vae_digits.yaml"), *FIT, NET.replace("16", "8")])
        cache = "--model.init_args.cache_dir=latents"
        main(["fit", "--config", str(CONFIGS / "latent_digits.yaml"), *FIT, NET, STEPS, cache])
        main(["fit", "--config", str(CONFIGS / "ddpm_single_image_32.yaml"), *FIT, NET, STEPS])
    return folder


def checkpoint(folder, name):
    return folder / f"runs/{MODELS.get(name, name)}/version_0/checkpoints/last.ckpt"


@pytest.fixture
def edit(trained, lightning):
    """Runs a task on a model and returns its record: `edit("img2img", "edm", ...)`."""

    def run(task, name, *options):
        lightning("edit", task, "--ckpt_path", checkpoint(trained, name), "--device=cpu", "--out=out", *options)
        return json.loads(Path("out/record.json").read_text())

    return run


def png(path):
    return np.asarray(Image.open(path)).astype(int)


# Every task on every family


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("task", TASKS)
def test_a_task_on_a_family(edit, trained, capsys, task, name):
    conditions = {"anagram": "0,1", "hybrid": "0,1", "interpolate": "3"}
    labels = ["--label", conditions[task]] if task in conditions and name == "edm" else []
    refused = {
        ("anagram", "latent"): "An anagram needs a model of pixels",
        ("hybrid", "latent"): "A hybrid needs a model of pixels",
        ("hybrid", "ddpm"): "A hybrid needs 2 conditions, but the model knows none",
        ("guidance", "ddpm"): "The model is unconditional",
        ("colorize", "edm"): "Colorizing needs a model of RGB images",
        ("colorize", "latent"): "Colorizing needs a model of RGB images",
    }
    if (task, name) in refused:
        assert refused[task, name] in stopped(capsys, edit, task, name, *OPTIONS[task])
        return
    record = edit(task, name, *OPTIONS[task], *labels)
    assert record["task"] == task
    assert record["model"]["sha256"] == file_hash(checkpoint(trained, name))
    assert record["versions"]["torch"]
    if task != "forward":
        assert record["sampling"]["sampler"] in ("heun", "ddpm")
    assert png("out/figure.png").std() > 5
    side = record["model"]["image_shape"][1]
    drawn = [path for path in Path("out").glob("*.png") if path.name not in ("figure.png", "small.png")]
    assert drawn and all(Image.open(path).size == (side, side) for path in drawn)


@pytest.mark.parametrize("method", ["dps", "pigdm", "mmps", "projection"])
def test_a_noisy_measurement_is_restored_by_each_method(edit, method):
    few = ["--num_steps=3", "--num_samples=1", "--noise=0.2"]
    record = edit("super_resolve", "edm", *few, "--factor=2", f"--method={method}", "--resamplings=1")
    assert (record["method"], record["noise"]) == (method, 0.2)
    assert (record["mean_error"] < 1e-5) == (method == "projection"), "a noisy measurement is not forced on the result"
    assert edit("deblur", "edm", *few, "--blur_sigma=1.0")["method"] == "mmps"


def test_what_does_not_suit_a_noisy_measurement_is_said(edit, capsys):
    for options, words in (
        (["--method=mmps"], "--noise is 0"),
        (["--method=mpps", "--noise=0.1"], "There is no method 'mpps'; choose one of projection, dps, pigdm, mmps"),
        (["--noise=-1"], "noise is -1"),
        (['--method_options={"iterations": 3}'], "--method_options are those of"),
        (["--noise=0.1", '--method_options={"iterations": 0}'], "iterations is 0"),
        (["--noise=0.1", '--method_options={"zeta": 1}'], "do not suit mmps"),
    ):
        assert words in stopped(capsys, edit, "super_resolve", "edm", "--factor=2", *options)
    said = stopped(capsys, edit, "super_resolve", "latent", "--factor=2", "--noise=0.1")
    assert "Posterior sampling needs a model of pixels" in said


def test_help_lists_tasks_and_their_options(lightning, capsys):
    lightning("edit")
    said = capsys.readouterr().out
    assert all(f"\n  {task} " in said for task in TASKS)
    for task in ("inpaint", "anagram"):
        with pytest.raises(SystemExit) as caught:
            lightning("edit", task, "--help")
        assert caught.value.code == 0
        said = capsys.readouterr().out
        assert f"usage: diffusion-lit edit {task}" in said and "--ckpt_path" in said and "--sampler_options" in said
        assert ("--image" in said) == (task == "inpaint")
    assert "There is no task 'paint'" in stopped(capsys, lightning, "edit", "paint")


# What the tasks write


def test_a_folder_holds_the_files_of_one_run(edit, capsys):
    Path("out").mkdir()
    Path("out/mine.png").write_bytes(b"")
    edit("img2img", "edm", "--starts=[0, 1]", "--num_steps=2", "--num_samples=2")
    record = edit("interpolate", "edm", "--num_frames=2", "--num_steps=2")
    found = sorted(path.name for path in Path("out").iterdir())
    assert found == sorted([*record["files"], "mine.png"])
    assert "interpolation.gif" in found and "start_0_0.png" not in found


def test_figures_are_printed_as_a_table_or_as_json(edit, trained, lightning, capsys):
    capsys.readouterr()
    record = edit("denoise", "ddpm", "--timesteps=[250, 500]", "--kernel_sizes=[3, 5]", "--num_steps=3")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    header = next(line for line in lines if line[:1] == ["PSNR"])
    assert header[3:6] == ["t", "250,", "sigma"] and header[7:10] == ["t", "500,", "sigma"]
    blurred = next(line for line in lines if line[:2] == ["Gaussian", "blur"])
    assert blurred[2:] == [f"{value:.2f}" for value in record["psnr"]["blur"].values()]
    assert record["timesteps"] == [250, 500] and record["kernel_size"] == [3, 5]
    shape = np.cos((np.array([0, 251, 501]) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2  # the cosine schedule, by hand
    expected = np.sqrt(shape[0] / shape[1:] - 1)
    assert np.allclose([float(sigma) for sigma in record["psnr"]["noisy"]], expected, rtol=1e-3)
    run = checkpoint(trained, "edm").parents[2]  # which is told, but not to the program that reads the figures
    lightning("edit", "invert", "--ckpt_path", run, "--device=cpu", "--out=out", "--num_steps=3", "--json")
    printed = capsys.readouterr()
    assert json.loads(printed.out)["psnr"] == json.loads(Path("out/record.json").read_text())["psnr"]
    assert f"Using {run}/version_0" in printed.err
    assert "has no schedule; give --sigmas" in stopped(capsys, edit, "forward", "edm", "--timesteps=[250]")
    assert "no step 1000 in --timesteps" in stopped(capsys, edit, "forward", "ddpm", "--timesteps=[1000]")
    assert "kernel_sizes is [3] for 4" in stopped(capsys, edit, "denoise", "ddpm", "--kernel_sizes=[3]")


def test_guidance_that_does_nothing_is_refused(edit, capsys):
    assert "--cfg_scale 3.0 does nothing without" in stopped(capsys, edit, "img2img", "edm", "--cfg_scale=3")
    assert "unconditional" in stopped(capsys, edit, "img2img", "ddpm", "--cfg_scale=3")
    assert "asks no network, so that --cfg_scale 3" in stopped(capsys, edit, "forward", "edm", "--cfg_scale=3")


def test_inpainting_leaves_the_known_pixels_alone(edit):
    record = edit("inpaint", "edm", "--box=[2, 1, 5, 8]", "--num_samples=2", "--label=3", "--resamplings=1")
    assert record["known_pixels_are_the_images"] and record["labels"] == ["3", "3"]
    given, mask = png("out/input.png"), png("out/mask.png")
    assert (mask[1:8, 2:5] == 255).all() and mask.sum() == 255 * 21
    for index in (0, 1):
        made = png(f"out/result_{index}.png")
        assert (made[mask == 0] == given[mask == 0]).all()
        assert (made[mask != 0] != given[mask != 0]).any()


def test_a_mask_of_the_images_size_is_fitted_like_the_image(edit, tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (64, 100, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "photo.png")
    mask = np.zeros((64, 100), np.uint8)
    mask[:32, 18:82] = 255  # the upper half of the centre square
    Image.fromarray(mask).save(tmp_path / "mask.png")
    edit("inpaint", "ddpm", "--image=photo.png", "--mask=mask.png", "--num_samples=1", "--resamplings=1")
    written = png("out/mask.png")
    assert (written[:16] == 255).all() and (written[16:] == 0).all()
    assert (png("out/result.png")[16:] == png("out/input.png")[16:]).all()


def test_image_to_image_tells_levels_and_figures(edit):
    record = edit("img2img", "edm", "--starts=[1, 20]", "--num_samples=2", "--label=4", "--sampler=ddim", "--seed=7")
    assert record["seeds"] == [7, 8] and record["labels"] == ["4", "4"]
    assert record["sampling"]["grid"] == "leading" and record["sampling"]["num_steps"] == 33
    far, near = record["starts"]["1"], record["starts"]["20"]
    assert far["sigma"] > near["sigma"]
    made, given = (torch.from_numpy(png(f"out/{name}.png")) for name in ("start_20_1", "input"))
    assert record["starts"]["20"]["psnr"][1] == decibels(made[None, None] / 127.5 - 1, given[None, None] / 127.5 - 1)[0]


def test_an_anagram_is_one_image_under_each_view(edit):
    views = ["identity", "flip_vertical", "negative"]
    record = edit("anagram", "edm", *[f"--view={view}" for view in views], "--label=7,3,1", "--num_samples=1")
    assert record["views"] == views and record["labels"] == ["7", "3", "1"]
    seen = {view: png(f"out/result_{view}.png") for view in views}
    assert (seen["flip_vertical"] == seen["identity"][::-1]).all()
    assert abs(seen["negative"] - (255 - seen["identity"])).max() <= 1  # halves are rounded


def test_an_interpolation_moves(edit):
    edit("interpolate", "edm", "--num_frames=4", "--seed=3", "--to_seed=9", "--label=2", "--scale=4")
    gif = Image.open("out/interpolation.gif")
    assert gif.size == (32, 32)
    assert gif.n_frames == 7  # there and back
    assert (png("out/frame_0.png") != png("out/frame_3.png")).any()


def test_an_exported_model_edits_the_same(edit, trained, lightning):
    first = edit("invert", "edm", "--num_steps=4")
    lightning("export", "--ckpt_path", checkpoint(trained, "edm"), "--out=model")
    lightning("edit", "invert", "--ckpt_path=model", "--device=cpu", "--num_steps=4", "--out=again")
    again = json.loads(Path("again/record.json").read_text())
    assert again["psnr"] == first["psnr"]
    assert again["model"]["sha256"] == file_hash(Path("model/model.safetensors"))


@pytest.mark.medium
def test_pretrained_models_edit_by_prompts(lightning, capsys, tmp_path):
    from diffusers import DDPMScheduler
    from helpers.pretrained_models import save_if, save_unet

    save_if(tmp_path / "if")
    model = ["--pretrained=if", "--device=cpu", "--num_steps=3", "--num_samples=1", "--out=out"]
    prompts = ["--prompt", "a rocket ship", "--prompt=an old man, with a hat"]
    lightning("edit", "anagram", *model, *prompts, "--view=identity", "--view=flip_vertical")
    record = json.loads(Path("out/record.json").read_text())
    assert record["labels"] == ["a rocket ship", "an old man, with a hat"]
    assert record["model"]["pretrained"] == "if" and record["sampling"]["sampler"] == "ddpm"
    lightning("edit", "img2img", *model, *prompts[:2], "--image=flower", "--starts=[1]", "--sampler=ddim")
    assert json.loads(Path("out/record.json").read_text())["labels"] == ["a rocket ship"]
    said = stopped(capsys, lightning, "edit", "img2img", *model, "--image=flower", "--label=3")
    assert "--labels 3 was given, but if is a text model" in said
    assert "say what it shall show by --prompt" in stopped(
        capsys, lightning, "edit", "img2img", *model, *prompts[:2], "--label=3"
    )
    assert "brings no data along" in stopped(capsys, lightning, "edit", "img2img", *model)
    save_unet(tmp_path / "plain", DDPMScheduler())
    plain = ["--pretrained=plain", *model[1:]]
    lightning("edit", "inpaint", *plain, "--image=china", "--resamplings=1")
    assert json.loads(Path("out/record.json").read_text())["known_pixels_are_the_images"]
    assert "reads no text" in stopped(capsys, lightning, "edit", "inpaint", *plain, *prompts[:2])


@pytest.mark.medium
def test_the_lines_of_the_page_on_editing_edit(trained):
    """On the tiny model of digits and with fewer steps, or it would take minutes."""
    page = (CONFIGS.parent / "docs/editing.md").read_text()
    lines = page.split("```python\n")[1].split("```")[0]
    lines = lines.replace("runs/edm_fashion_mnist/version_0/checkpoints/last.ckpt", str(checkpoint(trained, "edm")))
    names = {}
    exec(lines.replace("num_steps=100", "num_steps=3"), names)
    assert names["whole"].shape == names["large"].shape == names["clean"].shape == (4, 1, 8, 8)
    assert names["walk"].shape == (24, 1, 8, 8) and names["sweep"].shape == (10, 4, 1, 8, 8)


def test_the_gallery_shows_each_piece_once_and_tells_of_failures(trained, lightning, tmp_path, capsys):
    from datamodules import FashionMNIST
    from diffusion_lit.report import Page
    from experiments.gallery import ABOUT, PIECES, Piece, show

    assert {piece.model for piece in PIECES} == set(ABOUT) and {piece.task for piece in PIECES} == set(TASKS)
    for piece in PIECES:
        if "--labels" in piece.options and piece.model == "fashion_mnist":
            given = shlex.split(piece.options.format(drawing="x"))
            assert set(given[given.index("--labels") + 1].split(",")) <= set(FashionMNIST.names)
    pages = []
    for _ in range(2):
        pages.append(Page("Gallery"))
        piece = Piece(
            "digits", "interpolate", "--num_frames 3 --label 3", "A walk.", ("figure.png", "interpolation.gif")
        )
        show(pages[-1], piece, 0, checkpoint(trained, "edm"), tmp_path, None, tmp_path / "boot.png", "cpu")
    assert pages[0].html() == pages[1].html()
    assert "data:image/gif" in pages[0].html() and "diffusion-lit edit interpolate --num_frames 3" in pages[0].html()
    assert capsys.readouterr().out.count("interpolate: figure.png") == 1  # the second time it was there
    failing = Piece("digits", "colorize", "", "No colours here.")
    show(pages[-1], failing, 1, checkpoint(trained, "edm"), tmp_path, None, tmp_path / "boot.png", "cpu")
    assert "It failed: diffusion-lit: Colorizing needs a model of RGB images" in pages[-1].html()


@pytest.mark.medium
def test_the_gallerys_figures_are_of_the_model(trained, lightning, tmp_path):
    from diffusion_lit.report import Page
    from experiments.gallery import put_figures
    from experiments.harness.gallery_figures import VIEWS, measured

    path = checkpoint(trained, "edm")
    figures = measured(path, None, 4, "cpu", tmp_path)
    assert figures["accuracy"]["image"] > 0.9 and figures["chance"] == 0.1
    assert [row["views"] for row in figures["anagrams"]] == VIEWS and len(figures["hybrids"]) == 1
    for row in figures["anagrams"] + figures["hybrids"]:
        for which in ("trained", "untrained"):
            *views, whole = row[which]
            assert len(views) == len(row["views"]) and 0 <= whole <= min(views) <= max(views) <= 1
    assert figures["inpainting"] == {"heun": True, "ddim": True, "ddpm": True}
    assert figures["inversion"]["heun"][0] > 25 and figures["img2img"]["1"] < figures["img2img"]["20"]
    page = Page("Gallery")
    put_figures(page, figures, 4)
    assert page.html().count("anagram: ") == len(VIEWS) and "NO</td>" not in page.html()
    assert measured(path, None, 4, "cpu", tmp_path) == json.loads(json.dumps(figures))  # read where it was made


# Images of every kind


class Stub:
    """As much of a model as reading an image needs."""

    def __init__(self, channels=3, size=16):
        self.image_shape = (channels, size, size)


def gradient(width=40, height=30):
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([255 * columns / width, 255 * rows / height, 128 + 0 * rows], -1).astype(np.uint8)


def save_all(folder):
    image = Image.fromarray(gradient())
    image.save(folder / "rgb.png")
    image.quantize(64).save(folder / "palette.png")
    image.convert("CMYK").save(folder / "cmyk.jpg", quality=98)
    image.convert("L").save(folder / "grey.png")
    Image.fromarray(gradient()[..., 0].astype(np.uint16) * 257).save(folder / "sixteen.png")
    image.convert("1").save(folder / "bits.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: stored lying on its left side
    image.transpose(Image.Transpose.ROTATE_90).save(folder / "turned.jpg", quality=98, exif=exif)
    alpha = np.dstack([gradient(), np.full((30, 40), 255, np.uint8)])
    alpha[:, 20:, 3] = 0
    Image.fromarray(alpha).save(folder / "alpha.png")
    Image.fromarray(np.zeros((2, 3), np.uint8)).save(folder / "tiny.png")


@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_every_mode_are_fitted(tmp_path, channels):
    save_all(tmp_path)
    read = {p.name: ImageOptions(image=str(p)).read(Stub(channels)) for p in tmp_path.iterdir()}
    for name, image in read.items():
        assert image.shape == (1, channels, 16, 16), name
        assert image.min() >= -1 and image.max() <= 1
    for name in ("palette.png", "turned.jpg", "cmyk.jpg"):
        assert (read[name] - read["rgb.png"]).abs().mean() < 0.06, name
    assert (read["alpha.png"][..., 12:] > 0.98).all()  # white shows behind, but for the resampling's reach
    assert (read["alpha.png"] - read["rgb.png"])[..., :4].abs().max() < 0.03
    negative = ImageOptions(image=str(tmp_path / "rgb.png"), negative_image=True).read(Stub(channels))
    assert torch.equal(negative, -read["rgb.png"])


def test_a_image_of_twenty_thousand_pixels(tmp_path):
    Image.new("1", (20_000, 20_000)).save(tmp_path / "huge.png", compress_level=1)
    with pytest.raises(ValueError, match="more pixels than an image has"):
        ImageOptions(image=str(tmp_path / "huge.png")).read(Stub())
    Image.new("L", (20_000, 40), 0).save(tmp_path / "long.png")
    assert (ImageOptions(image=str(tmp_path / "long.png")).read(Stub()) == -1).all()


# What is refused


def test_images_that_cannot_be_used(edit, capsys, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"nonsense" * 20)
    Image.fromarray(gradient()).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:400])
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "folder").mkdir()
    for name, why in (
        ("broken.png", "The image broken.png is broken"),
        ("cut.jpg", "The image cut.jpg is broken"),
        ("text.png", "is not an image in one of the formats"),
        ("nowhere.png", "There is no image nowhere.png"),
        ("folder", "There is no image folder"),
    ):
        assert why in stopped(capsys, edit, "forward", "edm", "--image", name)
    assert "data_index is 400" in stopped(capsys, edit, "forward", "edm", "--data_index=400")


def test_masks_that_cannot_be_used(edit, capsys, tmp_path):
    Image.fromarray(gradient(20, 20)).save(tmp_path / "photo.png")
    Image.new("L", (7, 5), 255).save(tmp_path / "other.png")
    Image.new("L", (8, 8), 255).save(tmp_path / "full.png")
    Image.new("L", (8, 8), 0).save(tmp_path / "empty.png")
    said = stopped(capsys, edit, "inpaint", "edm", "--image=photo.png", "--mask=other.png")
    assert "The mask other.png is 7x5 pixels; make it the image's 20x20 or the model's 8x8" in said
    assert "other.png is 7x5 pixels; make it the model's 8x8" in stopped(
        capsys, edit, "inpaint", "edm", "--mask=other.png"
    )
    assert "covers the whole image" in stopped(capsys, edit, "inpaint", "edm", "--mask=full.png")
    assert "there is nothing to fill in" in stopped(capsys, edit, "inpaint", "edm", "--mask=empty.png")
    assert "give one of them" in stopped(capsys, edit, "inpaint", "edm", "--mask=full.png", "--box=[0,0,2,2]")
    assert "The box [4, 0, 2, 8] does not lie" in stopped(capsys, edit, "inpaint", "edm", "--box=[4,0,2,8]")
    assert "leaves no latent known" in stopped(capsys, edit, "inpaint", "latent", "--box=[1,0,8,8]")


@pytest.mark.medium
def test_conditions_that_do_not_fit(edit, lightning, trained, capsys):
    cases = [
        (["img2img", "edm", "--label=12"], "There is no class '12' for --labels 12; give a number from 0 to 9"),
        (["img2img", "edm", "--label=1,2"], "2 conditions were given, but this task takes one"),
        (["img2img", "edm", "--prompt", "a shoe"], "knows classes, not words; choose a class by --label"),
        (["img2img", "ddpm", "--label=1"], "the model is unconditional; leave --labels out"),
        (["anagram", "edm", "--label=1"], "An anagram of 2 views needs 2 conditions, but 1 was given"),
        (["anagram", "ddpm", "--label=1,2"], "the model is unconditional; leave --labels out"),
        (["anagram", "edm", "--label=1,2", "--view=identity", "--view=spin"], "There is no view 'spin'"),
        (["hybrid", "edm", "--label=1,2,3"], "A hybrid needs 2 conditions, but 3 were given"),
        (["hybrid", "edm", "--label=1,2", "--kernel_size=4"], "kernel_size is 4; give an odd number"),
        (["guidance", "edm", "--cfg_scale=3"], "takes --cfg_scales"),
        (["invert", "edm", "--sampler=ddpm"], "invert with a deterministic one"),
        (["img2img", "edm", "--starts=[40]"], "start 40 is no index of the grid"),
        (["img2img", "edm", "--num_samples=0"], "num_samples is 0"),
        (["super_resolve", "edm", "--factor=3"], "factor is 3"),
        (["interpolate", "edm", "--num_frames=1"], "num_frames is 1"),
        (["interpolate", "edm", "--scale=0"], "scale is 0"),
        (["img2img", "latent", "--clip_x0=static"], "bounds pixels to [-1, 1]"),
        (["img2img", "vae_digits"], "holds a VAE, which does not denoise"),
    ]
    for arguments, why in cases:
        assert why in stopped(capsys, edit, *arguments), arguments
    assert "Give one model" in stopped(capsys, lightning, "edit", "forward")
    both = ["--ckpt_path", checkpoint(trained, "edm"), "--pretrained=x/y"]
    assert "Give one model" in stopped(capsys, lightning, "edit", "forward", *both)
    assert "--prompt stands without its text" in stopped(capsys, lightning, "edit", "forward", "--prompt")
