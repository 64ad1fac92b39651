"""What `diffusion-lit evaluate` is asked to do: its options, checked."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch import LightningDataModule

from diffusion_lit.checks import check_count
from diffusion_lit.commands.options import SweepOptions
from diffusion_lit.diffusion.generate import Sampling
from diffusion_lit.modules.labels import check_guidance
from diffusion_lit.modules.latent import LatentDiffusion
from diffusion_lit.modules.protocols import Model, Settings
from diffusion_lit.storage.hashing import file_hash, weights_hash
from diffusion_lit.words import few


@dataclass(frozen=True)
class Plan(SweepOptions):
    """The model, what is drawn, and what it is compared with.

    Args:
        num_samples: Samples in each block; figures at different numbers do not compare.
        out: The report, a .json file.
        extractor: What images are compared by: inception, efficientnet_lite0, classifier, pixels, vgg16, clip or
            clip-VARIANT, dinov2 or dinov2-VARIANT. auto is inception for colour images, efficientnet_lite0 where that
            one's weights are not here (extra `features`), and for others classifier (trained on the data set on the
            spot unless --extractor_weights names one). Its name is part of every figure's name.
        extractor_weights: Local file of the extractor's weights; a checkpoint of configs/classifier_NAME.yaml for
            classifier.
        reference: Split to compare with: train, val, test or train+val; or a file: .npz with mu and sigma (EDM's,
            guided-diffusion's) or with arr_0. A list such as train,test gives the figures against each.
        num_blocks: Number of blocks; their own scatter needs at least 3.
        labels: Classes to draw: `all` (each equally often) or a list of numbers or names, such as 3,3,7,
            that is repeated. Without it, a
            model with classes draws each sample's class by the training set's frequencies.
        per_class: Also gives the Fréchet distance of each class.
        memorization: Also asks whether samples are nearer to training images than chance allows, with an image of
            the worst pairs.
        likelihood: Also gives bits per dimension of the test images.
        likelihood_images: Number of images that the likelihood is taken over.
        reconstruction: Also measures reconstructions of held-out images (rFD, PSNR, SSIM and a perceptual distance,
            with floors) and draws a panel of them; by default for a VAE.
        save_samples: Keeps the samples as PNG files in this folder.
        data: Other data than the checkpoint's own, as a class of datamodules and its arguments.
        batch_size: Samples drawn at a time on each rank; does not change them.
        keep_shards: Keeps the features of all samples beside the report.
    """

    num_samples: int = 50_000
    out: str = "runs/evaluations/report.json"
    extractor: str = "auto"
    extractor_weights: str | None = None
    reference: str = "train"
    num_blocks: int = 3
    per_class: bool = False
    memorization: bool = False
    likelihood: bool = False
    likelihood_images: int = 1000
    reconstruction: bool | None = None
    save_samples: str | None = None
    data: LightningDataModule | None = None
    batch_size: int = 64
    keep_shards: bool = False

    def __post_init__(self) -> None:
        """Checks the numbers."""
        check_count(2, num_samples=self.num_samples, likelihood_images=self.likelihood_images)
        check_count(num_blocks=self.num_blocks, batch_size=self.batch_size)
        check_count(0, seed=self.seed)
        numbers = ("sigma_min", "sigma_max", "guidance_interval", "guidance_rescale")
        Sampling().replace(**{name: getattr(self, name) for name in numbers})
        if Path(self.out).suffix != ".json":
            raise ValueError(f"--out {self.out} must end in .json; a page of the same name with .md goes beside it.")
        if Path(self.out).is_dir():
            raise ValueError(f"--out {self.out} is a folder; give the name of a file.")

    @property
    def path(self) -> Path:
        """The JSON report."""
        return Path(self.out)

    @property
    def folder(self) -> Path:
        """Where shards are kept until the report is written."""
        return self.path.with_suffix(".parts")

    @property
    def total(self) -> int:
        """Number of samples of one setting, all blocks together."""
        return self.num_samples * self.num_blocks

    def idle_with_one_image(self) -> list[str]:
        """What to warn of where all training images are the same, so that nothing is compared with sets of images."""
        names = ("reference", "per_class", "memorization", "reconstruction")
        idle = [f"--{name}" for name in names if getattr(self, name) != getattr(Plan, name)]
        if not idle:
            return []
        does = "does" if len(idle) == 1 else "do"
        return [f"All training images are the same one, which samples are compared with; {few(idle)} {does} nothing."]

    def model_hash(self, module: Model) -> str:
        """The hash that identifies the model's weights: of the checkpoint's file, or of pretrained weights."""
        known = weights_hash(module.state_dict()) if self.ckpt_path is None else file_hash(Path(self.ckpt_path))
        if self.decoder is None or not isinstance(module, LatentDiffusion):
            return known
        return f"{known} decoded by {module.space.sha256}"

    def check_guidance(self, module: Model, settings: Sequence[Settings]) -> None:
        """Refuses guidance that does nothing; every sample has a class where there are any.

        Args:
            module: The model.
            settings: All that are to be measured, of which one at least must be guided where options of guidance stand.
        """
        guided = [one for one in settings if one.cfg_scale not in (0, 1) or one.autoguided] or settings
        for setting in settings:
            given = {**self.guidance, "cfg_scale": None if self.cfg_scale is None else setting.cfg_scale}
            if setting is not guided[0]:
                given |= {"guidance_interval": None, "guidance_rescale": None}
            check_guidance(module, setting, module.num_classes > 0, **given)
