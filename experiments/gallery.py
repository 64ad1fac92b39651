"""Every editing task on models that a laptop can train, on one page: images, the commands that made them, figures.

Models that are not given are trained by `diffusion-lit fit`: handwritten digits (EDM, DDPM and latent diffusion),
FashionMNIST and a single photograph. Interrupted, it goes on where it was. The figures ask a classifier trained on the
data what it sees in anagrams and hybrids, beside chance and beside the same network untrained, and take the PSNR of
image-to-image and inversion.

    python -m experiments.gallery --fashion_mnist runs/edm_fashion_mnist/version_0/checkpoints/last.ckpt
"""

import contextlib
import io
import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from diffusion_lit.commands.main import main
from diffusion_lit.report import Page
from diffusion_lit.storage.hashing import file_hash
from experiments.harness.command import command
from experiments.harness.gallery_figures import COMPOSED, HYBRID_BLUR, measured
from experiments.harness.runs import Failed, Run, fit

ABOUT = {
    "fashion_mnist": "FashionMNIST: class-conditional EDM, 32x32",
    "digits": "Handwritten digits: class-conditional EDM, 8x8",
    "ddpm_digits": "Handwritten digits: class-conditional DDPM",
    "latent_digits": "Handwritten digits: diffusion on the 4x4 latents of a VAE",
    "single_image": "One photograph: unconditional DDPM that knows one image by heart, 32x32 in colour",
}

COMPOSING = " ".join(f"--{name} {value}" for name, value in COMPOSED.items())


@dataclass(frozen=True)
class Piece:
    """One image of the gallery.

    Args:
        model: Key of `ABOUT`.
        task: Task of `diffusion-lit edit`.
        options: Its options.
        text: What to see.
        files: The images to show.
        data: Whether the model's data is read, whose folder may have to be told.
    """

    model: str
    task: str
    options: str
    text: str
    files: tuple[str, ...] = ("figure.png",)
    data: bool = False


PIECES = [
    Piece("fashion_mnist", "forward", "--data_index 0", "Noise drowns the image, x = x0 + sigma n.", data=True),
    Piece(
        "fashion_mnist",
        "denoise",
        "--data_index 0 --labels 'Ankle boot'",
        "The best Gaussian blur, the mean of what could be behind the noise (one step), a draw of it (step by step).",
        data=True,
    ),
    Piece(
        "fashion_mnist",
        "img2img",
        "--data_index 1 --num_samples 2",
        "From an invention to the image itself, as the start level falls.",
        data=True,
    ),
    Piece(
        "fashion_mnist",
        "img2img",
        "--image {drawing} --negative_image --labels 'Ankle boot' --starts '[5, 7, 10, 12, 15, 20]' --cfg_scale 2",
        "A drawing in black on white becomes an ankle boot.",
    ),
    Piece(
        "fashion_mnist",
        "img2img",
        "--data_index 1 --labels Bag --cfg_scale 3 --num_samples 2",
        "A pullover on the way to a bag.",
        data=True,
    ),
    Piece(
        "fashion_mnist",
        "inpaint",
        "--data_index 1 --box '[0, 16, 32, 32]' --resamplings 5",
        "The lower half is filled in, the upper half is the image's, bit for bit.",
        data=True,
    ),
    Piece("fashion_mnist", "inpaint", "--data_index 0 --resamplings 5", "The middle is filled in.", data=True),
    Piece(
        "fashion_mnist",
        "super_resolve",
        "--data_index 0 --factor 4",
        "From 8x8 pixels; the means over 4x4 squares of each result are these pixels.",
        data=True,
    ),
    Piece(
        "fashion_mnist",
        "deblur",
        "--data_index 0 --blur_sigma 1.5 --noise 0.1",
        "A blur and noise taken off by MMPS, which forces nothing on the result.",
        data=True,
    ),
    Piece(
        "fashion_mnist",
        "anagram",
        f"--labels Dress,Bag --view identity --view rotate_90 {COMPOSING}",
        "A dress; turned by a quarter, a bag.",
    ),
    Piece(
        "fashion_mnist",
        "anagram",
        f"--labels 'Ankle boot',Bag --view identity --view flip_vertical {COMPOSING}",
        "An ankle boot; upside down, a bag.",
    ),
    Piece(
        "fashion_mnist",
        "anagram",
        f"--labels Bag,Dress --view identity --view jigsaw {COMPOSING}",
        "A bag; cut into sixteen pieces, moved and turned, a dress.",
    ),
    Piece(
        "fashion_mnist",
        "hybrid",
        f"--labels 'Ankle boot',Pullover --blur_sigma {HYBRID_BLUR} {COMPOSING}",
        "From afar (small) an ankle boot, from near (large) a pullover.",
    ),
    Piece(
        "fashion_mnist",
        "interpolate",
        "--labels Dress --to_seed 5",
        "From one dress to another.",
        ("figure.png", "interpolation.gif"),
    ),
    Piece("fashion_mnist", "invert", "--data_index 1", "To its noise and back, in 100 steps each.", data=True),
    Piece("fashion_mnist", "guidance", "", "The same seed for each class under stronger and stronger guidance."),
    Piece("digits", "anagram", "--labels 6,9 --cfg_scale 2", "A six; turned round, a nine."),
    Piece(
        "digits",
        "anagram",
        "--labels 8,8,0 --view identity --view rotate_90 --view negative --cfg_scale 2",
        "Three views: an eight, an eight on its side, and in the negative a zero.",
    ),
    Piece(
        "digits",
        "interpolate",
        "--labels 3 --to_seed 7",
        "From a three to a three.",
        ("figure.png", "interpolation.gif"),
    ),
    Piece("digits", "guidance", "--labels 0,3,7", "Guidance on digits."),
    Piece("ddpm_digits", "denoise", "--labels 3 --data_index 0", "The same denoising by a DDPM.", data=True),
    Piece("ddpm_digits", "img2img", "--data_index 1 --num_samples 2", "Image-to-image by a DDPM.", data=True),
    Piece("ddpm_digits", "inpaint", "--data_index 1 --box '[0, 4, 8, 8]'", "The lower half, by a DDPM.", data=True),
    Piece("ddpm_digits", "anagram", "--labels 6,9 --cfg_scale 2", "An anagram by a DDPM."),
    Piece("ddpm_digits", "invert", "--data_index 1", "Inversion by heun on a model trained as DDPM.", data=True),
    Piece("latent_digits", "forward", "--data_index 1", "Noise on latents, decoded.", data=True),
    Piece("latent_digits", "img2img", "--data_index 1 --num_samples 2", "Image-to-image on latents.", data=True),
    Piece(
        "latent_digits",
        "inpaint",
        "--data_index 1 --box '[0, 4, 8, 8]'",
        "The lower half, on latents; the known pixels are pasted back.",
        data=True,
    ),
    Piece("latent_digits", "interpolate", "--labels 8 --to_seed 4", "From an eight to an eight."),
    Piece(
        "latent_digits", "invert", "--data_index 1", "Inversion of a latent; the autoencoder costs the rest.", data=True
    ),
    Piece("single_image", "colorize", "--image flower --num_samples 3", "It remembers the colours of its image."),
    Piece(
        "single_image",
        "super_resolve",
        "--image flower --factor 8 --num_samples 3",
        "And its details, from 4x4 pixels.",
    ),
    Piece("single_image", "inpaint", "--image flower --num_samples 3", "And what was in the middle."),
    Piece("single_image", "img2img", "--image china --num_samples 1", "Any other image turns into its own."),
]


def gallery(
    fashion_mnist: str | None = None,
    digits: str | None = None,
    ddpm_digits: str | None = None,
    latent_digits: str | None = None,
    single_image: str | None = None,
    data_root: str | None = None,
    num_samples: int = 50,
    device: str = "auto",
    out: str = "runs/gallery",
) -> None:
    """Makes the gallery: OUT/index.html, which holds all its images, and OUT/figures.json.

    Args:
        fashion_mnist: Checkpoint of configs/edm_fashion_mnist.yaml; trained if it is not given.
        digits: Checkpoint of configs/edm_digits.yaml.
        ddpm_digits: Checkpoint of configs/ddpm_digits.yaml.
        latent_digits: Checkpoint of configs/latent_digits.yaml.
        single_image: Checkpoint of configs/ddpm_single_image_32.yaml.
        data_root: Folder of FashionMNIST's four idx files.
        num_samples: Images for each figure that a classifier gives.
        device: auto, cpu, cuda, ...
        out: Folder for the page, the images and what is trained.
    """
    folder = Path(out)
    given = {
        "fashion_mnist": fashion_mnist,
        "digits": digits,
        "ddpm_digits": ddpm_digits,
        "latent_digits": latent_digits,
        "single_image": single_image,
    }
    lost: dict[str, str] = {}
    models = {name: Path(path) for name, path in given.items() if path is not None}
    for name in given:
        if name not in models:
            made = train(name, folder / "models", data_root)
            if isinstance(made, Failed):
                lost[name] = f"The model could not be trained: {made.reason} (see {made.log})."
            else:
                models[name] = made
    page = Page(
        "Gallery of edits",
        "What trained denoisers can do beyond sampling. Every image was made by the command below it.",
    )
    drawing = folder / "drawing.png"
    folder.mkdir(parents=True, exist_ok=True)
    draw_boot().save(drawing)
    roots = {"fashion_mnist": data_root}
    for name, title in ABOUT.items():
        page.heading(title)
        if name in lost:
            page.text(lost[name])
            continue
        for number, piece in enumerate(piece for piece in PIECES if piece.model == name):
            show(page, piece, number, models[name], folder, roots.get(name), drawing, device)
    if "fashion_mnist" in models:
        figures = measured(models["fashion_mnist"], data_root, num_samples, device, folder)
        put_figures(page, figures, num_samples)
    page.write(folder / "index.html")
    print(f"The gallery is {folder / 'index.html'}.")


def train(name: str, out: Path, data_root: str | None) -> Path | Failed:
    """Trains a model through `diffusion-lit fit`, or finds it trained.

    Args:
        name: Key of `ABOUT`.
        out: Folder of runs.
        data_root: Folder of FashionMNIST's files, or None for the config's.

    Returns:
        Its checkpoint, or why there is none.
    """
    configs = {"fashion_mnist": "edm_fashion_mnist", "digits": "edm_digits", "single_image": "ddpm_single_image_32"}
    options: dict[str, Any] = {}
    if name == "fashion_mnist" and data_root is not None:
        options["data.init_args.root"] = data_root
    if name == "latent_digits":
        [vae] = fit([Run("vae_digits", "configs/vae_digits.yaml")], out)
        if isinstance(vae, Failed):
            return vae
        options["model.init_args.vae_ckpt"] = str(vae.ckpt_path.resolve())
    [made] = fit([Run(name, f"configs/{configs.get(name, name)}.yaml", options)], out)
    return made if isinstance(made, Failed) else made.ckpt_path


def draw_boot() -> Image.Image:
    """A boot as a child draws it, black on white, of a size that is no model's."""
    sheet = Image.new("RGB", (300, 240), "white")
    pen = ImageDraw.Draw(sheet)
    pen.polygon([(160, 50), (225, 50), (225, 185), (70, 185), (65, 155), (115, 140), (160, 115)], fill=(60, 60, 60))
    pen.rectangle([65, 182, 228, 196], fill="black")
    return sheet


def show(
    page: Page,
    piece: Piece,
    number: int,
    ckpt_path: Path,
    folder: Path,
    root: str | None,
    drawing: Path,
    device: str,
) -> None:
    """Runs a task, unless it was run before, and puts its images and its command on the page."""
    place = folder / "images" / f"{piece.model}-{number}-{piece.task}"
    words = [piece.task, *shlex.split(piece.options.format(drawing=drawing))]
    words += ["--data_root", root] if piece.data and root is not None else []
    run = ["edit", *words, "--ckpt_path", str(ckpt_path), "--device", device, "--out", str(place)]
    record = place / "record.json"
    said = place / "command.json"
    recipe = {"run": run, "sha256": file_hash(ckpt_path)}
    page.heading(f"{piece.task}: {piece.text}", level=3)
    if not (record.is_file() and said.is_file() and json.loads(said.read_text()) == recipe):
        with contextlib.redirect_stderr(io.StringIO()) as error:
            try:
                main(run)
            except SystemExit:
                page.text(f"It failed: {error.getvalue().strip().splitlines()[-1]}")
                print(f"{place.name} failed: {error.getvalue().strip()}")
                return
        said.write_text(json.dumps(recipe))
    page.images([(place / file, "") for file in piece.files], columns=len(piece.files))
    page.command(shlex.join(["diffusion-lit", "edit", *words, "--ckpt_path", str(ckpt_path)]))


def put_figures(page: Page, figures: dict[str, Any], count: int) -> None:
    """The figures as tables."""
    page.heading("Figures of the FashionMNIST model")
    how = ", ".join(f"{name} {value}" for name, value in COMPOSED.items())
    page.text(
        f"What a classifier sees in {count} images of each kind ({how}), whose classes are "
        "not chosen to go well together: the share in which it names the class asked for. It was trained on the "
        f"training images, under the same blur for hybrids. Chance is {figures['chance']:.0%}; of real test images "
        "it names " + ", ".join(f"{value:.1%} ({name})" for name, value in figures["accuracy"].items()) + ". The view "
        "'negative' shows a limit: these data are bright things on black, whose negatives are none of them."
    )
    rows = []
    for kind in ("anagrams", "hybrids"):
        for result in figures[kind]:
            for place, view in enumerate([*result["views"], "all at once"]):
                rows.append(
                    [
                        f"{kind[:-1]}: {' / '.join(result['views'])}" if place == 0 else "",
                        view,
                        f"{result['trained'][place]:.0%}",
                        f"{result['untrained'][place]:.0%}",
                        f"{figures['chance'] ** (len(result['views']) if view == 'all at once' else 1):.2g}",
                    ]
                )
    page.table(["images", "view", "trained", "untrained", "chance"], rows)
    page.table(
        ["start level", *figures["img2img"]],
        [["PSNR to the input, dB", *(f"{value:.1f}" for value in figures["img2img"].values())]],
        "Image-to-image, mean over 8 test images",
    )
    page.table(
        ["sampler", "mean PSNR, dB", "least, dB"],
        [[name, f"{mean:.1f}", f"{least:.1f}"] for name, (mean, least) in figures["inversion"].items()],
        "Inversion and back, 100 steps each way, 4 test images (at most 100 dB: equal)",
    )
    page.table(
        ["sampler", "known pixels are the image's, bit for bit"],
        [[name, "yes" if same else "NO"] for name, same in figures["inpainting"].items()],
        "Inpainting the lower half of 4 test images",
    )


if __name__ == "__main__":
    command(gallery)
