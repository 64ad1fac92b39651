"""The kinds of models that the torture trains: a config of the embedded digits each, and what makes it small."""

from dataclasses import dataclass
from pathlib import Path

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FEW = ["--model.init_args.sampling.num_steps=3", "--sample_grid.rows=2", "--sample_grid.columns=2"]
FEW += ["--trajectory.count=1", "--trajectory.columns=4"]
SMALL = ["--model.init_args.net.init_args.model_channels=16"]
DENOISER = [*SMALL, *FEW, "--model.init_args.net.init_args.dropout=0.1"]
FIGURES = {  # the config's figures on few samples and pixel features, which need no classifier
    name: {
        "class_path": f"diffusion_lit.callbacks.{name}",
        "init_args": {"extractor": "diffusion_lit.evaluation.Pixels", "num_samples": 32},
    }
    for name in ("FID", "ReconstructionFID")
} | {name: {"class_path": f"diffusion_lit.callbacks.{name}"} for name in ("Reconstructions", "Interpolations")}


@dataclass(frozen=True)
class Family:
    """A kind of model on the embedded digits.

    Args:
        config: Its config, below configs/.
        options: Options that make it small.
        figures: Callbacks of its config.
        needs: Families of which a trained run has to be there first; `{NAME}` in an option is that run's checkpoint.
    """

    config: str
    options: list[str]
    figures: tuple[str, ...] = ("FID",)
    needs: tuple[str, ...] = ()


FAMILIES = {
    "ddpm": Family("ddpm_digits.yaml", DENOISER),
    "edm": Family("edm_digits.yaml", DENOISER),
    "given": Family(
        "edm_digits.yaml",
        [
            *[*DENOISER, "--model.init_args.net.init_args.condition_channels=2"],
            "--model.init_args.condition=diffusion_lit.diffusion.DegradedImage",
            "--model.init_args.condition.init_args.degradation=diffusion_lit.diffusion.Box",
            "--model.init_args.condition.init_args.steps=[2, 16]",
        ],
    ),
    "consistency": Family("consistency_digits.yaml", [option for option in DENOISER if "num_steps" not in option]),
    "meanflow": Family("meanflow_digits.yaml", DENOISER),
    "vae": Family("vae_digits.yaml", SMALL, ("Reconstructions", "Interpolations", "ReconstructionFID", "FID")),
    "vae_sharp": Family(
        "vae_digits.yaml",
        [
            *SMALL,
            "--model.init_args.adversary=diffusion_lit.modules.Adversary",
            "--model.init_args.adversary.init_args.start_step=5",
            "--model.init_args.adversary.init_args.levels=1",
            "--model.init_args.adversary.init_args.lr_ratio=0.5",
            "--model.init_args.perceptual=diffusion_lit.modules.ClassifierPerceptual",
        ],
        ("Reconstructions", "ReconstructionFID"),
    ),
    "vae_codes": Family(
        "vae_digits.yaml",
        [
            *SMALL,
            "--model.init_args.net.init_args.bottleneck={class_path: diffusion_lit.nets.VQ, init_args: {codes: 32}}",
        ],
        ("Reconstructions", "Interpolations", "FID"),
    ),
    "cold": Family(
        "cold_digits.yaml",
        [*SMALL, "--model.init_args.degradation=diffusion_lit.diffusion.Mask"],
        ("Reconstructions", "ReconstructionFID", "FID"),
    ),
    "latent": Family(
        "latent_digits.yaml",
        [*DENOISER, "--model.init_args.vae_ckpt={vae}"],
        ("Reconstructions", "Interpolations", "ReconstructionFID", "FID"),
        needs=("vae",),
    ),
}
