"""Imports point one way, inside functions too, and no two files import each other in a circle."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TORCH_ONLY = {"torch", "einops"}
ORDER = ("modules", "pretrained", "evaluation", "report", "callbacks", "commands", "experiments")
BELOW = {"diffusion": set(), "nets": {"diffusion"}, "runtime": set(), "storage": {"runtime"}}
GROUND = {*BELOW, "datamodules"}  # what every room above may import
ROOMS = {**BELOW, **{room: GROUND | set(ORDER[:place]) for place, room in enumerate(ORDER)}}
LOOSE = {"diffusion_lit", "diffusion_lit.__main__", "diffusion_lit.saving"}  # the doors: they may name any room
FLOOR = ("diffusion_lit.checks", "diffusion_lit.words")  # stand below all rooms and import none
OF_DATAMODULES = {"storage", "runtime"}  # and the keyed generator


def modules():
    """Every module of the project by name."""
    paths = [path for top in ("diffusion_lit", "datamodules", "experiments") for path in (ROOT / top).rglob("*.py")]
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}
    assert len(names) > 150
    return names


def room_of(module):
    top, *rest = module.split(".")
    return rest[0] if top == "diffusion_lit" and rest else top


def imports(path):
    """Every name that a file imports, wherever in it: modules, and what is taken from them."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def graph():
    """Which modules of the project each one imports."""
    known = modules()
    edges = {}
    for name, path in known.items():
        found = {one for one in imports(path) if one in known and one != name}
        edges[name] = {one for one in found if not any(other.startswith(f"{one}.") for other in found)}
    return edges


def allowed(module, imported):
    room, other = room_of(module), room_of(imported)
    if module in FLOOR:
        return False
    if module in LOOSE or room == other or imported in FLOOR:
        return True
    if room == "datamodules":
        return other in OF_DATAMODULES or imported == "diffusion_lit.diffusion.rng"
    return imported == "diffusion_lit" or other in ROOMS[room]


def test_every_file_lies_in_a_room():
    for module in modules():
        assert module in {*LOOSE, *FLOOR} or room_of(module) in {*ROOMS, "datamodules"}, f"{module} lies in no room"


def test_a_room_imports_only_what_lies_to_its_left():
    wrong = [f"{one} -> {other}" for one, others in graph().items() for other in others if not allowed(one, other)]
    assert not wrong


def test_no_files_import_each_other_in_a_circle():
    try:
        TopologicalSorter(graph()).prepare()
    except CycleError as error:
        pytest.fail(f"circle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("room", ["diffusion", "nets"])
def test_the_mathematics_and_the_networks_know_torch_alone(room):
    for path in (ROOT / "diffusion_lit" / room).rglob("*.py"):
        for name in imports(path):
            top = name.split(".")[0]
            assert top in TORCH_ONLY | {"diffusion_lit"} or top in sys.stdlib_module_names, f"{path} imports {name}"


def test_importing_the_modules_loads_no_metrics_and_no_plots():
    """What is loaded in the end, by name too, beyond what Lightning itself loads (torchmetrics brings both)."""
    foreign = ("torch_fidelity", "matplotlib", "diffusers", "datamodules", "diffusion_lit.evaluation")
    code = f"""
import sys, lightning.pytorch, torchmetrics
before = set(sys.modules)
import diffusion_lit.modules
print([name for name in set(sys.modules) - before if name.startswith({foreign})])"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
