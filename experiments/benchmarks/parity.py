"""The same samples through `diffusion-lit evaluate` and through torch-fidelity's own command."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from diffusion_lit.commands.evaluate import evaluate
from diffusion_lit.commands.evaluate_plan import Plan
from diffusion_lit.evaluation.generation import save_pngs
from diffusion_lit.evaluation.metrics import kid_subset_size
from diffusion_lit.modules.load import prepared_data
from diffusion_lit.modules.weights import read_state
from experiments.harness.show import keep_json, markdown

PARITY = {
    "fid_inception": "frechet_inception_distance",
    "kid_inception": "kernel_inception_distance_mean",
    "precision_inception": "precision",
    "recall_inception": "recall",
    "isc_inception": "inception_score_mean",
}


def random_inception(path: Path) -> Path:
    """Seeded random weights of Inception in a file."""
    from torch_fidelity import feature_extractor_inceptionv3 as library

    class Shell(library.FeatureExtractorInceptionV3):  # type: ignore[misc]
        def load_state_dict(self, state: Any) -> None:  # type: ignore[override]
            """Keeps the random weights of the constructor."""

    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save({}, path)
        network = Shell("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path))
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        nn.init.normal_(network.fc.weight, std=0.3)
    torch.save(network.state_dict(), path)
    return path


def compare_with_command(
    checkpoint: Path, parity: str, count: int, folder: Path, batch_size: int, accelerator: str
) -> str:
    """The same images through `diffusion-lit evaluate` and through torch-fidelity's command.

    Args:
        checkpoint: The model whose samples are compared.
        parity: A file of Inception's weights, or `random`.
        count: Number of samples and of images of the reference.
        folder: Where the report goes.
        batch_size: Samples drawn at a time.
        accelerator: Where to draw them.

    Returns:
        A page with both figures and their difference.
    """
    real = torch.as_tensor(prepared_data(checkpoint, "fit").reference_images("train")[:count])
    with tempfile.TemporaryDirectory() as scratch:
        here = Path(scratch)
        weights = here / "inception.pth"
        if parity == "random":
            random_inception(weights)
        else:
            torch.save(read_state(Path(parity), "Inception"), weights)
        save_pngs(real, range(len(real)), here / "real")
        ours = evaluated(checkpoint, here, real, str(weights), count, batch_size, accelerator)
        words = [sys.executable, "-m", "torch_fidelity.fidelity", "--input1", str(here / "samples")]
        words += ["--input2", str(here / "real"), "--isc", "--fid", "--kid", "--prc", "--cpu", "--json", "--silent"]
        words += ["--feature-extractor", "inception-v3-compat", "--feature-extractor-weights-path", str(weights)]
        words += ["--kid-subset-size", str(kid_subset_size(count, len(real))), "--no-cache", "--save-cpu-ram"]
        said = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    theirs = json.loads(said[said.index("{") :])
    keep_json(folder / "parity.json", {"ours": ours, "theirs": theirs})
    told = [
        {
            "figure": name,
            "diffusion-lit evaluate": f"{ours[name]:.7g}",
            "fidelity": f"{theirs[key]:.7g}",
            "relative difference": f"{abs(ours[name] - theirs[key]) / max(abs(theirs[key]), 1e-12):.1e}",
        }
        for name, key in PARITY.items()
    ]
    return f"# The same {count} samples through both commands ({parity} weights)\n\n{markdown(told)}"


def evaluated(
    checkpoint: Path, scratch: Path, real: torch.Tensor, weights: str, count: int, batch_size: int, accelerator: str
) -> dict[str, float]:
    """Our figures of one block, on the same images as the other command.

    Args:
        checkpoint: The model.
        scratch: A folder, in which `samples` is made.
        real: The images of the reference, uint8 (N, C, H, W).
        weights: File of Inception's weights.
        count: Number of samples.
        batch_size: Samples drawn at a time.
        accelerator: Where to draw them.
    """
    np.savez(scratch / "real.npz", arr_0=real.permute(0, 2, 3, 1).numpy())
    plan = Plan(
        ckpt_path=str(checkpoint),
        num_samples=count,
        num_blocks=1,
        extractor="inception",
        extractor_weights=weights,
        reference=str(scratch / "real.npz"),
        save_samples=str(scratch / "samples"),
        out=str(scratch / "report.json"),
        batch_size=batch_size,
        device=accelerator,
    )
    evaluate(plan)
    report = json.loads((scratch / "report.json").read_text())
    (reference,) = report["results"][0]["references"].values()
    return {name: value["mean"] for name, value in reference["figures"].items()}
