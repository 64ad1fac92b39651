"""`lightning evaluate`: a checkpoint's figures, with a receipt."""

from functools import partial
from json import loads
from pathlib import Path
from typing import Any

from lightning.fabric import Fabric
from lightning.pytorch import LightningDataModule

from diffusion_lit.checks import check_count
from diffusion_lit.commands.evaluate_run import Plan, run
from diffusion_lit.diffusion.samplers import sampler_table
from diffusion_lit.report.receipt_page import likelihood_sentence, plain_table, tables
from diffusion_lit.runtime.ranks import fabric as ranks_of
from diffusion_lit.runtime.ranks import several


def evaluate(
    ckpt_path: str,
    num_samples: int = 50_000,
    out: str = "report.json",
    extractor: str = "auto",
    extractor_weights: str | None = None,
    reference: str = "train",
    num_blocks: int = 3,
    labels: str | None = None,
    cfg_scale: str | None = None,
    sampler: str | None = None,
    num_steps: str | None = None,
    grid: str | None = None,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    clip_x0: str | None = None,
    sampler_options: dict[str, float | str | bool] | None = None,
    grid_options: dict[str, float | str | bool] | None = None,
    guidance_interval: tuple[float, float] | None = None,
    guidance_rescale: float | None = None,
    seed: int = 0,
    per_class: bool = False,
    memorization: bool = False,
    likelihood: bool = False,
    likelihood_images: int = 1000,
    save_samples: str | None = None,
    data: LightningDataModule | None = None,
    data_root: str | None = None,
    batch_size: int = 64,
    devices: int = 1,
    accelerator: str = "auto",
    strategy: str = "auto",
    keep_shards: bool = False,
    json: bool = False,
) -> None:
    """Measures a checkpoint: Fréchet and kernel distance, precision, recall and more, with a receipt.

    Writes OUT (JSON) and a page beside it (.md). Draws NUM_BLOCKS disjoint blocks of NUM_SAMPLES samples with the
    average (EMA) weights and gives each figure as mean ± standard deviation over the blocks beside the minimum and the
    real-against-real floor. --sampler, --num_steps and --cfg_scale take lists, such as heun,ddim, and then there are a
    table and a plot of quality against cost (.png). Killed and started again, it goes on where it was. What is not
    given is as the model was trained to be sampled.

    Args:
        ckpt_path: Checkpoint file, such as runs/edm_digits/version_0/checkpoints/last.ckpt.
        num_samples: Samples in each block; figures at different numbers do not compare.
        out: The report, a .json file.
        extractor: What images are compared by: inception, classifier, pixels, vgg16, clip or clip-VARIANT, dinov2 or
            dinov2-VARIANT; auto is inception for colour images, else classifier (trained on the data set on the spot
            unless --extractor_weights names one). Its name is part of every figure's name.
        extractor_weights: Local file of the extractor's weights; a checkpoint of configs/classifier_NAME.yaml for
            classifier.
        reference: Split to compare with: train, val, test or train+val; or a file: .npz with mu and sigma (EDM's,
            guided-diffusion's) or with arr_0. A list such as train,test gives the figures against each.
        num_blocks: Number of blocks; error bars need at least 3.
        labels: Classes to draw: `all` (each equally often) or a list such as 3,3,7 that is repeated. Without it, a
            model with classes draws each sample's class by the training set's frequencies.
        cfg_scale: Guidance, uncond + cfg_scale * (cond - uncond); a list measures each.
        sampler: Name of the sampler; the table below lists them; a list measures each.
        num_steps: Number of sampling steps; a list measures each.
        grid: Noise levels of the steps: karras, exponential, log_snr, uniform_t, leading, linspace or trailing.
        sigma_min: Smallest noise level of the grid above 0.
        sigma_max: Largest noise level of the grid.
        clip_x0: Threshold on predicted images: none, static or dynamic.
        sampler_options: Options of the sampler, as JSON: '{"S_churn": 40}'.
        grid_options: Options of the grid, as JSON: '{"rho": 7}'.
        guidance_interval: Noise levels within which guidance acts, as JSON: '[0.3, 5]'.
        guidance_rescale: Share in [0, 1] of the rescaling of guided predictions.
        seed: Seed of the first sample; sample i has the seed SEED + i.
        per_class: Also gives the Fréchet distance of each class.
        memorization: Also asks whether samples are nearer to training images than chance allows, with an image of
            the worst pairs.
        likelihood: Also gives bits per dimension of the test images.
        likelihood_images: Number of images that the likelihood is taken over.
        save_samples: Keeps the samples as PNG files in this folder.
        data: Other data than the checkpoint's own, as a class of datamodules and its arguments.
        data_root: Where the checkpoint's own data lies now.
        batch_size: Samples drawn at a time on each rank; does not change them.
        devices: Number of processes, one per device, that share the work; as many as torchrun has started.
        accelerator: auto, cpu, gpu, ...
        strategy: How processes are started: ddp, or ddp_fork within another Python program.
        keep_shards: Keeps the features of all samples beside the report.
        json: Prints the report, and nothing else, on standard output, for a program.

    Raises:
        ValueError: If the checkpoint, data, extractor and options do not fit together, or weights are missing.
    """
    options: dict[str, Any] = dict(locals())
    for name in ("data", "devices", "accelerator", "strategy", "json"):
        options.pop(name)
    plan = Plan(**options, data=data)
    check_count(devices=devices)
    ranks = ranks_of(devices, accelerator, strategy) if several(devices) else Fabric(accelerator=accelerator, devices=1)
    written = ranks.launch(partial(run, plan=plan))
    if ranks.is_global_zero and written:
        text = Path(written[0]).read_text()
        print(text if json else summary(loads(text), written))


def summary(report: dict[str, Any], written: list[str]) -> str:
    """What a person reads when it is done: the figures, the warnings, and where the rest is.

    Args:
        report: The report.
        written: The files.

    Returns:
        Lines.
    """
    lines = []
    for table in tables(report):
        lines += [table.title, plain_table([table.header, *table.rows]), ""]
    lines += [likelihood_sentence(report)] if report.get("likelihood") else []
    lines += [f"warning: {warning}" for warning in report["warnings"]]
    return "\n".join([*lines, *(f"  {path}" for path in written)])


def help_notes() -> str:
    """What closes the help: the table of samplers."""
    return sampler_table()
