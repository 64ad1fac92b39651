"""`diffusion-lit doctor`: what this machine is, what is installed, what is cached, and what a run would choose."""

import os
import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, distributions, requires, version
from pathlib import Path

from packaging.requirements import Requirement

from diffusion_lit import __version__
from diffusion_lit.commands.configs import configs_folder
from diffusion_lit.runtime.installation import ROOT, foreign_lightning

PACKAGE = "diffusion-lit"
SHOWN = ("torch", "torchvision", "lightning", "jsonargparse", "torch-fidelity")


def doctor() -> None:
    """Says what this machine is, which extras are there, which caches and how large, and what a run would choose."""
    for title, lines in (
        ("Installation", installation()),
        ("Machine", machine()),
        ("A run would choose", choices()),
        ("Extras", extras()),
        ("Caches", caches()),
        ("Notes", notes()),
    ):
        if lines:
            print(f"{title}:")
            width = max(len(name) for name, _ in lines)
            print("\n".join(f"  {name:<{width}}  {value}" for name, value in lines))


def installation() -> list[tuple[str, str]]:
    """Versions, and where the package and its configurations lie."""
    found = [(name, _version(name) or "missing") for name in SHOWN]
    places = [("package", str(ROOT / "diffusion_lit")), ("configs", str(configs_folder()))]
    return [(PACKAGE, __version__), ("python", f"{platform.python_version()} ({sys.executable})"), *found, *places]


def machine() -> list[tuple[str, str]]:
    """Processor, memory, devices."""
    import torch

    from diffusion_lit.runtime.hardware import describe, device_type, use_threads

    use_threads()
    lines = [("system", f"{platform.system()} {platform.release()}"), ("processor", describe("cpu"))]
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        lines.append(("memory", _size(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))))
    for index in range(torch.cuda.device_count()):
        one = torch.cuda.get_device_properties(index)
        lines.append((f"cuda:{index}", f"{one.name}, {_size(one.total_memory)}, capability {one.major}.{one.minor}"))
    kind = device_type()
    if kind not in ("cpu", "cuda"):
        lines.append((kind, describe(kind)))
    if kind == "cpu":
        built = torch.version.cuda
        reason = "torch finds no CUDA device or driver" if built else "this torch is built without CUDA"
        lines.append(("accelerator", f"none: {reason}"))
    return lines


def choices() -> list[tuple[str, str]]:
    """The defaults that `fit` would choose."""
    import torch

    from diffusion_lit.runtime.hardware import bf16_pays, channels_last_pays, device_type

    device = device_type()
    precision = "bf16-mixed" if bf16_pays(device) else "32-true"
    layout = "NHWC" if channels_last_pays(device, precision) else "NCHW"
    threads = f", {torch.get_num_threads()} threads" if device == "cpu" else ""
    return [
        ("device", f"1 x {device}{threads}"),
        ("precision", f"training in {precision}, figures in 32-true"),
        ("layout", layout),
    ]


def extras() -> list[tuple[str, str]]:
    """For each extra, which packages are installed and which are missing."""
    try:
        wanted = requires(PACKAGE) or []
    except PackageNotFoundError:
        return [("unknown", f"{PACKAGE} is not installed; this is a folder of its code")]
    parts: dict[str, list[str]] = {}
    for needed in map(Requirement, wanted):
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", str(needed.marker))
        if extra and needed.name != PACKAGE:
            parts.setdefault(extra[1], []).append(needed.name)
    lines = []
    for name, needs in parts.items():
        missing = [need for need in needs if _version(need) is None]
        there = ", ".join(f"{need} {_version(need)}" for need in needs if need not in missing)
        lines.append((name, f"missing: {', '.join(missing)}" if missing else there))
    return lines


def caches() -> list[tuple[str, str]]:
    """Cache folders of this project and its libraries."""
    import torch

    from diffusion_lit.storage.cache import cache_folder

    own = cache_folder()
    parts = sorted(own.glob("*")) if own.is_dir() else []
    lines = [(str(part), _size(_bytes(part))) for part in parts] or [(str(own), "empty")]
    hub = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    others = [folder for folder in (Path(torch.hub.get_dir()), hub) if folder.is_dir()]
    return lines + [(str(folder), _size(_bytes(folder))) for folder in others]


def notes() -> list[tuple[str, str]]:
    """Notes on possible problems."""
    from diffusion_lit.runtime.hardware import cpu_contention

    owners = sorted(
        one.metadata["Name"]
        for one in distributions()
        if one.metadata["Name"] != PACKAGE
        and any(entry.group == "console_scripts" and entry.name == "lightning" for entry in one.entry_points)
    )
    claimed = f"{', '.join(owners)} declares a command `lightning` too: write diffusion-lit." if owners else None
    return [("-", note) for note in (foreign_lightning() or claimed, cpu_contention()) if note]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _bytes(folder: Path) -> int:
    """Bytes below a folder, links not followed."""
    if not folder.is_dir():
        return folder.lstat().st_size
    return sum(os.lstat(Path(place, name)).st_size for place, _, files in os.walk(folder) for name in files)


def _size(count: int) -> str:
    """Bytes in a unit that suits them: 1.5 GiB."""
    size, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.3g} {units[0]}"
