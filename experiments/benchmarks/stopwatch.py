"""How long some work takes: seconds of the clock and of the CPU, and page faults, once the device has done it."""

import resource
import time
from dataclasses import dataclass

import torch


@dataclass
class Slice:
    """Cost of some work: seconds, CPU seconds, page faults, and the number of images."""

    seconds: float
    cpu: float
    faults: int
    images: int


class Stopwatch:
    """Measures the time of this process from the stopwatch's construction."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._wait()
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        self._faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    def read(self, images: int = 0) -> Slice:
        """What has passed."""
        self._wait()
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - self._faults
        return Slice(time.perf_counter() - self._wall, time.process_time() - self._cpu, faults, images)

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
