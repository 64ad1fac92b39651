"""References that come as a file: the field's npz files, and this project's own.

`mu` and `sigma` are mean and covariance of Inception's 2,048 features, as EDM and guided-diffusion publish them;
`arr_0` is a batch of uint8 images N x H x W x C, as guided-diffusion does. A file that holds both gives its
statistics to the Fréchet distance and its images to the rest. A .safetensors file is one from this project's cache
and carries its record. Nothing is unpickled.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion_lit.evaluation.features import FeatureExtractor, Features
from diffusion_lit.evaluation.metrics import Reference, Statistics
from diffusion_lit.storage.hashing import file_hash
from diffusion_lit.storage.tensors import read_record, read_tensors

INCEPTION_DIMENSION = 2048


def is_file(reference: str) -> bool:
    """Whether a reference names a file and not a split.

    Args:
        reference: What the user gave.

    Returns:
        True for a path that ends in .npz, .safetensors, .pkl or .pickle.
    """
    return Path(reference).suffix in (".npz", ".safetensors", ".pkl", ".pickle")


def reference_from_file(
    path: Path,
    extractor: FeatureExtractor,
    image_shape: tuple[int, int, int],
    batch_size: int = 64,
    progress: Callable[[int], object] | None = None,
) -> Reference:
    """Reads a reference from a file.

    Args:
        path: A .npz file with `mu` and `sigma`, with `arr_0`, or with all three, or a .safetensors file of this
            project.
        extractor: A loaded extractor; the file must belong to it.
        image_shape: Shape (C, H, W) of the samples that are to be compared.
        batch_size: Images at a time.
        progress: Called with the number of images after each batch.

    Returns:
        The reference; its record names the file, its hash and what was used of it.

    Raises:
        ValueError: If the file is missing or unreadable, needs unpickling, or does not belong to the extractor or to
            images of this shape.
    """
    if not path.is_file():
        raise ValueError(f"There is no reference file {path}; give a .npz file, or a split such as train or test.")
    if path.suffix == ".safetensors":
        return _own(path, extractor, image_shape)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files if name in ("mu", "sigma", "arr_0")}
    except (ValueError, OSError, EOFError, AttributeError) as error:
        raise ValueError(
            f"{path} was not read as a reference: it is no .npz file of plain arrays. Pickled statistics (.pkl) are "
            "not opened, since that runs code from the file; convert them to a .npz file with mu and sigma."
        ) from error
    return _foreign(path, arrays, extractor, image_shape, batch_size, progress)


def _foreign(
    path: Path,
    arrays: Mapping[str, Any],
    extractor: FeatureExtractor,
    image_shape: tuple[int, int, int],
    batch_size: int,
    progress: Callable[[int], object] | None,
) -> Reference:
    """A reference of the field's."""
    features: Features | None = None
    statistics: Statistics | None = None
    if "arr_0" in arrays:
        features = extractor.extract(_images(path, arrays["arr_0"], image_shape), batch_size, progress)
    record: dict[str, Any] = {"file": path.name, "sha256": file_hash(path), "arrays": sorted(arrays)}
    if "mu" in arrays and "sigma" in arrays and extractor.name == "inception":
        statistics = _statistics(path, arrays["mu"], arrays["sigma"])
        record["used"] = "mu and sigma for fid_inception" + (", arr_0 for the rest" if features is not None else "")
        record["count"] = None
    elif features is not None:
        record |= {"used": "arr_0", "count": len(features)}
    elif "mu" in arrays and "sigma" in arrays:
        raise ValueError(
            f"{path} holds mean and covariance of Inception's features, and the extractor is {extractor.name}; use "
            "--extractor inception, or a file with images in arr_0."
        )
    else:
        raise ValueError(f"{path} holds neither mu and sigma nor arr_0 and is no reference.")
    return Reference(features, statistics, record=record)


def _images(path: Path, array: Any, image_shape: tuple[int, int, int]) -> Tensor:
    """The images of `arr_0`, in this project's order of dimensions."""
    channels, height, width = image_shape
    if array.dtype != np.uint8 or array.ndim != 4:
        raise ValueError(f"arr_0 of {path} is {array.dtype} of shape {array.shape}; it must be uint8 N x H x W x C.")
    if tuple(array.shape[1:]) != (height, width, channels):
        raise ValueError(
            f"The images in {path} are {array.shape[1]}x{array.shape[2]} with {array.shape[3]} channels, and the "
            f"samples are {height}x{width} with {channels}; a resize on one side would change the figure. Use a "
            "reference of the same size."
        )
    return torch.from_numpy(array).permute(0, 3, 1, 2)


def _statistics(path: Path, mu: Any, sigma: Any) -> Statistics:
    """Checked mean and covariance."""
    size = INCEPTION_DIMENSION
    if mu.shape != (size,) or sigma.shape != (size, size):
        raise ValueError(
            f"mu and sigma of {path} have shapes {mu.shape} and {sigma.shape}; Inception's are ({size},) and "
            f"({size}, {size})."
        )
    mu, sigma = mu.astype(np.float64), sigma.astype(np.float64)
    scale = float(np.abs(sigma).max())
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise ValueError(f"mu or sigma of {path} holds values that are not finite.")
    if np.abs(sigma - sigma.T).max() > 1e-5 * scale or sigma.diagonal().min() < -1e-5 * scale:
        raise ValueError(f"sigma of {path} is no covariance: it is not symmetric or has a negative variance.")
    return Statistics(mu, sigma)


def _own(path: Path, extractor: FeatureExtractor, image_shape: tuple[int, int, int]) -> Reference:
    """A file from this project's cache, refused where it belongs to something else."""
    record = read_record(path)
    for what, found, wanted in (
        ("extractor", record.get("extractor"), extractor.identity()),
        ("shape of images", record.get("image_shape"), list(image_shape)),
    ):
        if found != wanted:
            raise ValueError(
                f"{path} was made with another {what} ({found}) than is used here ({wanted}) and does not compare; "
                "leave --reference out to compute it anew."
            )
    tensors = read_tensors(path, record)
    if tensors is None or "features" not in tensors:
        raise ValueError(f"{path} is damaged; leave --reference out to compute it anew.")
    features = Features(tensors["features"], tensors.get("logits"))
    record = {"file": path.name, "sha256": file_hash(path), **record}
    return Reference(features, record=record)
