"""Studies, one file each: `python -m experiments.NAME` leaves a table or a figure.

`harness/` is what they stand on, `benchmarks/` what measures this project beside others.
"""

from pathlib import Path

# For old names: `python -m experiments.torture` runs experiments.benchmarks.torture, and a user's
# study that imports `experiments.study` gets a second copy of experiments.harness.study.
__path__ = [*__path__, *(str(Path(__file__).parent / folder) for folder in ("benchmarks", "harness"))]
