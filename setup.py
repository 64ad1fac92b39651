"""Which packages are installed; everything else stands in pyproject.toml.

The folder configs/ ships as the data of `diffusion_lit.configs`. setuptools' search for packages does not find a
folder that is mapped in this way, so that search and mapping meet here.
"""

from pathlib import Path

from setuptools import find_packages, setup

CONFIGS = [folder for folder in (Path("configs"), *Path("configs").rglob("*")) if folder.is_dir()]
PACKAGES = [".".join(("diffusion_lit", *folder.parts)) for folder in CONFIGS]

setup(
    packages=[*find_packages(include=["diffusion_lit*", "datamodules*"]), *PACKAGES],
    package_dir={"diffusion_lit.configs": "configs"},
    package_data={package: ["*.yaml"] for package in PACKAGES}
    | {
        "diffusion_lit": ["py.typed"],
        "diffusion_lit.report": ["templates/*.html.j2"],
    },
)
