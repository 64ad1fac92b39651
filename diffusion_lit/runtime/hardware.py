"""Properties of this machine, and defaults that follow from them.

Torch is imported late, so that the allocator is configured before anything is allocated.
"""

import ctypes
import math
import os
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_lit.words import counted

if TYPE_CHECKING:
    import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h
CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def keep_freed_memory() -> bool:
    """Tells glibc's allocator to keep freed memory instead of returning it to the kernel.

    A forward pass frees and allocates tens of megabytes. By default glibc maps each large block anew and the kernel
    clears its pages: on 2 cores of a Xeon 9,000 page faults and 5% of the time of a float32 training step, against 500
    and none with this. Peak memory stays the same. Variables of glibc (`GLIBC_TUNABLES`, `MALLOC_TRIM_THRESHOLD_`, ...)
    set by the user are kept.

    Returns:
        Whether it was told; other C libraries than glibc are left alone.
    """
    if platform.libc_ver()[0] != "glibc" or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def device_type(accelerator: str = "auto") -> str:
    """The kind of device that Lightning's `accelerator` leads to.

    Args:
        accelerator: `auto`, `cpu`, `gpu`, `cuda`, `mps`, ...

    Returns:
        torch's name of it: `cpu`, `cuda`, `mps`, ...
    """
    import torch

    if accelerator not in ("auto", "gpu"):
        return accelerator
    found = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if found is None else found.type


def bf16_pays(device: str) -> bool:
    """Whether a network trains faster under bf16 autocast than in float32.

    It does on GPUs that compute in bf16 (compute capability 8.0 and above) and on CPUs with AMX or AVX-512 BF16, where
    a step of the U-Net of 1.7M parameters was 1.55 times as fast (2 cores of a Sapphire Rapids Xeon). On other CPUs
    bf16 is emulated.

    Args:
        device: torch's name of the kind of device.
    """
    import torch

    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device != "cpu" or platform.system() == "Darwin":
        return False
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def channels_last_pays(device: str, precision: str = "32-true") -> bool:
    """Whether convolutions run faster on feature maps in the layout NHWC.

    They do on tensor cores, and in float32 on x86 CPUs, where a step in NCHW took 1.08 to 1.12 times as long (2 cores
    of a Sapphire Rapids Xeon). In bf16 on a CPU torch's group norm loses more in NHWC than the convolutions gain.

    Args:
        device: torch's name of the kind of device.
        precision: As Lightning names it, such as `32-true` or `bf16-mixed`.
    """
    if device == "cpu":
        return precision == "32-true" and platform.machine() in ("x86_64", "AMD64")
    return device == "cuda"


def use_threads() -> int:
    """Limits torch's threads to a container's CPU quota.

    torch counts cores, which a quota does not hide; more threads than the quota wait for each other. `OMP_NUM_THREADS`
    is kept if it is set.
    """
    import torch

    try:
        quota, period = CGROUP_QUOTA.read_text().split()
        allowed = math.ceil(int(quota) / int(period))
    except (OSError, ValueError):  # no such file, or no limit: "max 100000"
        allowed = torch.get_num_threads()
    if "OMP_NUM_THREADS" not in os.environ and allowed < torch.get_num_threads():
        torch.set_num_threads(allowed)
    return torch.get_num_threads()


def describe(device: str) -> str:
    """The hardware in a few words.

    Args:
        device: torch's name of the kind of device.

    Returns:
        Such as "2 threads on a CPU with AMX and AVX-512 BF16", or the GPU's name.
    """
    import torch

    if device == "cuda":
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    text = f"{counted(threads, 'thread')} on a {platform.machine()} CPU"
    if device != "cpu":
        return f"{device} with a {platform.machine()} CPU"
    can = {"AMX": torch.cpu._is_amx_tile_supported(), "AVX-512 BF16": torch.cpu._is_avx512_bf16_supported()}
    skills = [name for name, there in can.items() if there]
    return f"{text} with {' and '.join(skills)}" if skills else text


def cpu_contention() -> str:
    """Advice where other programs compete with torch's threads for the cores.

    Threads wait for each other at every operation, and so for the one without a core: with one of 2 cores taken, a step
    of the digits' network took 5.7 s in two threads and 63 ms in one.

    Returns:
        A sentence, or "" where the load of the last minute fits the cores.
    """
    import torch

    cores = os.cpu_count() or 1
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if torch.get_num_threads() == 1 or load < cores + 0.5:
        return ""
    return (
        f"Other programs are busy on this machine (load {load:.1f} on {cores} cores), and torch's "
        f"threads wait for each other; OMP_NUM_THREADS={max(1, cores - 1)} may be many times as fast."
    )


def pick_device(name: str) -> "torch.device":
    """A device by its name.

    Args:
        name: `auto` (an accelerator where there is one), `cpu`, `cuda`, `cuda:1`, ...

    Raises:
        ValueError: If this machine has no such device.
    """
    import torch

    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"There is no device {name!r} here; use auto, cpu or one that this machine has.") from error


def hardware(device: "torch.device", ranks: int) -> dict[str, Any]:
    """What the samples were made on.

    Args:
        device: The device of rank 0.
        ranks: Number of processes.

    Returns:
        Name of the processor and numbers of ranks and threads.
    """
    import torch

    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return {"device": device.type, "processor": name, "ranks": ranks, "threads": torch.get_num_threads()}
