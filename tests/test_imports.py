"""Imports point one way: experiments, commands, modules, mathematics and nets; datamodules stands alone."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TORCH_ONLY = {"torch", "einops"}
COMMANDS = {
    "diffusion_lit.__main__",
    "diffusion_lit.cli",
    "diffusion_lit.training",
    "diffusion_lit.sample",
    "diffusion_lit.edit",
}
RULES = {  # files under this folder may import of the project only these
    "diffusion_lit/diffusion": {"diffusion_lit.diffusion"},
    "diffusion_lit/nets": {"diffusion_lit.nets"},
    "datamodules": {"datamodules"},
    "diffusion_lit/modules": {
        "diffusion_lit.diffusion",
        "diffusion_lit.nets",
        "diffusion_lit.modules",
        "diffusion_lit.evaluation",
        "diffusion_lit.checkpoints",  # of the autoencoder that latents come from
        "diffusion_lit.pretrained",
    },
}
PROJECT = ("diffusion_lit", "datamodules", "experiments", "tests")


def imports(path):
    """Every module name that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module


def files(folder):
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("folder", RULES)
def test_a_layer_imports_only_what_lies_below_it(folder):
    assert files(folder)
    for path in files(folder):
        for name in imports(path):
            if name.split(".")[0] in PROJECT:
                assert any(name == low or name.startswith(low + ".") for low in RULES[folder]), f"{path} imports {name}"


@pytest.mark.parametrize("folder", ["diffusion_lit/diffusion", "diffusion_lit/nets"])
def test_the_mathematics_and_the_networks_know_torch_alone(folder):
    import sys

    for path in files(folder):
        for name in imports(path):
            top = name.split(".")[0]
            assert top in TORCH_ONLY | {"diffusion_lit"} or top in sys.stdlib_module_names, f"{path} imports {name}"


def test_nothing_below_the_commands_imports_them_or_the_experiments():
    for folder in ("diffusion_lit", "datamodules"):
        for path in files(folder):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            for name in imports(path):
                assert name.split(".")[0] not in ("experiments", "tests"), f"{path} imports {name}"
                if module not in COMMANDS:
                    assert name not in COMMANDS - {"diffusion_lit.sample"}, f"{path} imports {name}"
