"""Tracks of the speedrun: the conditions that all entries share.

A track fixes the data (to the hash of its training images), the time and the device, the seeds, the number of samples
and of network evaluations, and what the samples are measured by (to the hash of the extractor). Its key is
the hash of all this and stands in each receipt: two figures compare only under the same key.

FashionMNIST and the digits are measured on the features of small classifiers whose weights lie beside the entries
(`speedruns/*.safetensors`, made by `classifier_of`, 160 kB each), colour images on `efficientnet_lite0`.
"""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch
from safetensors import safe_open

from diffusion_lit.evaluation.choose import make_extractor
from diffusion_lit.evaluation.classifiers import ClassifierFeatures
from diffusion_lit.evaluation.features import FeatureExtractor, Features, MissingWeights
from diffusion_lit.evaluation.metrics import Reference, kernel_distance
from diffusion_lit.nets.classifier import ConvClassifier
from diffusion_lit.runtime.hardware import use_threads
from diffusion_lit.storage.hashing import key_of
from experiments.harness.evaluator import Evaluator, choose_extractor

SPEEDRUNS = Path(__file__).parent / "speedruns"


@dataclass(frozen=True)
class Track:
    """The conditions that all entries share.

    Args:
        data: Path of the class of the data.
        minutes: Training time of each seed, the time of the clock from the first step on.
        data_options: Arguments of the data, other than its folder and the batch size.
        images: SHA-256 of its training images and labels (`fingerprint`); None where it is not locked.
        device: `cpu` or `cuda`.
        threads: Threads of torch, None for as many as there are.
        seeds: Seeds of the trainings.
        num_samples: Images that each draws.
        evaluations: Evaluations of the network per image, at most; a guided step takes two.
        extractor: What images are compared by, as in `diffusion-lit evaluate`; `locked` is the classifier beside the
            entries, and `auto` what the studies take.
        measure: SHA-256 of the extractor's identity (its name, weights and transform); None where it is not locked.
        metric: `fd`, the Fréchet distance, or `kd`, the kernel distance, to the training images.
        replayed: Number of steps at either end of a training that are done again when a receipt is verified.
    """

    data: str
    minutes: float
    data_options: dict[str, Any] = field(default_factory=dict)
    images: str | None = None
    device: str = "cpu"
    threads: int | None = 2
    seeds: tuple[int, ...] = (0, 1, 2)
    num_samples: int = 2000
    evaluations: int = 20
    extractor: str = "locked"
    measure: str | None = None
    metric: str = "fd"
    replayed: int = 100

    @property
    def key(self) -> str:
        """The hash of all its conditions."""
        return key_of(asdict(self))

    def make_data(self, root: str | None, batch_size: int) -> Any:
        """The data, set up.

        Args:
            root: Its folder, where it has one.
            batch_size: Images per training step.

        Raises:
            ValueError: If its training images are not those of the track.
        """
        data = resolve_name(self.data)(**self.arguments(root), batch_size=batch_size)
        data.prepare_data()
        data.setup()
        found = data.fingerprint("train")
        if self.images not in (None, found):
            name = type(data).__name__
            raise ValueError(
                f"The training images of {name}{f' in {root}' if root else ''} have the hash {found[:16]} and those of "
                f"the track {str(self.images)[:16]}; the track needs the published files, unchanged."
            )
        return data

    def arguments(self, root: str | None) -> dict[str, Any]:
        """Arguments of the data, without the batch size."""
        folder = {} if root is None or self.data.endswith("Digits") else {"root": root}
        return {**self.data_options, **folder}

    def make_extractor(self, data: Any, weights: str | None = None) -> FeatureExtractor:
        """What the images are compared by, loaded.

        Args:
            data: The data, set up.
            weights: File of the weights of an extractor that is not locked.

        Raises:
            MissingWeights: If it cannot be had here.
            ValueError: If it is not that of the track.
        """
        if self.extractor == "locked":
            name = self.data.rpartition(".")[2]
            extractor: FeatureExtractor = LockedClassifier(SPEEDRUNS / f"classifier_{name}.safetensors")
        else:
            extractor = _named(self.extractor, weights, data)
        extractor.load(data)
        found = key_of(extractor.identity())
        if self.measure not in (None, found):
            raise ValueError(
                f"The extractor {self.extractor} has the hash {found[:16]} with its weights and transform, and that of "
                f"the track {str(self.measure)[:16]}; the track needs the published weights and the same transform."
            )
        return extractor

    def check_machine(self) -> int:
        """Sets the threads.

        Raises:
            ValueError: If this machine has fewer.
        """
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("The track is for a GPU, and torch finds none here; choose a track for CPUs.")
        there = os.process_cpu_count() if hasattr(os, "process_cpu_count") else os.cpu_count()
        if self.threads is not None and (there or 1) < self.threads:
            raise ValueError(f"The track is for {self.threads} cores of a CPU, and this process has {there}.")
        if self.threads is None:
            return use_threads()
        torch.set_num_threads(self.threads)
        return self.threads


def _named(name: str, weights: str | None, data: Any) -> FeatureExtractor:
    """An extractor of `diffusion-lit evaluate`.

    Raises:
        MissingWeights: If this version has none of the name.
    """
    if name == "auto":
        return choose_extractor(data, name, weights, print)
    try:
        return make_extractor(name, weights, data.image_shape)
    except ValueError as error:
        raise MissingWeights(
            f"The track is measured by the extractor {name}, which is not to be had here: {error}"
        ) from error


class LockedClassifier(ClassifierFeatures):
    """A small classifier whose weights lie in a file of the repository.

    Args:
        path: The .safetensors file, which holds the network's arguments too.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def load(self, data: Any = None) -> None:
        """Reads the file.

        Raises:
            MissingWeights: If it is missing.
        """
        if not self.path.exists():
            raise MissingWeights(f"There is no {self.path}; speedruns run from a clone of the repository.")
        with safe_open(self.path, framework="pt") as file:  # type: ignore[no-untyped-call]
            network = ConvClassifier(**json.loads(file.metadata()["config"]))
            network.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        self.network = network.eval().requires_grad_(False)


class Judge(Evaluator):
    """Measures samples as a track prescribes.

    Args:
        track: The track.
        data: Its data, set up.
        weights: File of the weights of an extractor that is not locked.
    """

    def __init__(self, track: Track, data: Any, weights: str | None = None) -> None:
        self.track = track
        held_out = len(data.split("val").images)
        super().__init__(data, track.make_extractor(data, weights), track.num_samples, held_out)

    @property
    def metric(self) -> str:
        """Name of the figure, such as `fd_classifier`."""
        return f"{self.track.metric}_{self.extractor.name}"

    def between(self, drawn: Features, real: Reference) -> float:
        """The track's distance of samples to real images."""
        if self.track.metric == "fd":
            return super().between(drawn, real)
        assert real.features is not None
        return kernel_distance(drawn.features, real.features.features)


DIGITS: dict[str, Any] = {
    "images": "8956a92d97e1c2f34293404e184613590ebb899d21710e8608f6b9088d886131",
    "measure": "f96b8456b6ce318e94b05ed7681b4290c0b28d6061a83018760dd724d2571e40",
}
IMAGENET: dict[str, Any] = {
    "extractor": "efficientnet_lite0",
    "measure": "c371e1a60908bff95ce4bf5e19db02967e2a34ce6d72f7704655ec8cf5b052ca",
    "metric": "kd",
}
TRACKS = {
    "fashion_mnist": Track(
        "datamodules.FashionMNIST",
        7.0,
        images="f14a76fc6036014b7482f03d1f42460d99ebeff6b9744c0f470a2e7db52cce75",
        measure="1bb214deaab9014bd6561d5a5d1de77199630187ba1d127aaf433472e58251d6",
    ),
    "cifar10": Track("datamodules.CIFAR10", 30.0, **IMAGENET),
    "digits_one_step": Track("datamodules.Digits", 3.0, evaluations=1, **DIGITS),
    "cifar10_gpu": Track("datamodules.CIFAR10", 10.0, device="cuda", threads=None, **IMAGENET),
    "digits_seconds": Track(  # for trying an entry, and for tests
        "datamodules.Digits", 0.05, threads=1, seeds=(0, 1), num_samples=100, evaluations=4, replayed=5, **DIGITS
    ),
}
