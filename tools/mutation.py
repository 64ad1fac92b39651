"""Plants one wrong coefficient after another in samplers and prediction types, and checks that the tests notice.

    python tools/mutation.py [--only NAME ...] [--jobs N] [--list]

A mutant is the package with one arithmetic change in one of these functions: a plus for a minus, a product for a
quotient, a sign left out, a number changed by 5 percent (by 0.05 where it is 0); or with one of the changes written out
in `BY_HAND`. The tests must pass on the code as it is, and run on each mutant until the first one fails. A table says
for each function how many were planted and caught, and then what survived; the exit status is 1 if anything did. Each
mutant runs in a forked process, so that torch is imported once.
"""

import argparse
import ast
import copy
import importlib.util
import os
import resource
import signal
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CORE = "diffusion_lit/diffusion"
SAMPLER_TESTS = ["test_samplers_textbook.py", "test_samplers_order.py", "test_samplers_moments.py", "test_samplers.py"]
TESTS = {
    f"{CORE}/samplers/common.py": SAMPLER_TESTS,
    f"{CORE}/samplers/single_step.py": SAMPLER_TESTS,
    f"{CORE}/samplers/dpm_solver.py": SAMPLER_TESTS,
    f"{CORE}/samplers/unipc.py": SAMPLER_TESTS,
    f"{CORE}/samplers/adaptive.py": [
        "test_samplers_adaptive.py",
        "test_samplers_order.py",
        "test_samplers.py",
        "test_samplers_moments.py",
    ],
    f"{CORE}/preconditioning.py": ["test_preconditioning.py", "test_samplers_moments.py"],
    f"{CORE}/samplers/consistency.py": SAMPLER_TESTS[-1:],
    f"{CORE}/consistency_loss.py": ["test_consistency_loss.py"],
    f"{CORE}/consistency_parts.py": ["test_consistency_loss.py"],
    f"{CORE}/meanflow_loss.py": ["test_meanflow_loss.py"],
    f"{CORE}/samplers/meanflow.py": ["test_samplers.py", "test_meanflow_loss.py"],
    f"{CORE}/denoiser.py": ["test_denoiser.py", "test_wrappers.py"],
    f"{CORE}/grids.py": ["test_grids.py"],
    f"{CORE}/analytic.py": ["test_analytic.py"],
    f"{CORE}/likelihood.py": ["test_likelihood.py"],
}
SKIP = {
    "DormandPrince._attempt": "step control: how long the next step is, not what a step computes",
    "DormandPrince.__init__": "the length of the first step",
    "Preconditioning.check": "the rounding that the refusal of noise levels allows",
    "_principal_axes": "the rounding below which a variance counts as 0",
    "Likelihood.__post_init__": "refusals",
}
EQUIVALENT = {
    ("GaussianMixtureDenoiser.sample", "self.means[label] - spread"): "the spread is symmetric",
    ("denoise_and_trace", "product / signs"): "signs are 1 and -1",
}
BY_HAND = {  # what no change of arithmetic plants: file, function, what is there, what is put in its place
    f"{CORE}/consistency_loss.py": [
        ("ConsistencyLoss.forward", "torch.no_grad():", "torch.enable_grad():"),  # gradients through the target
        ("ConsistencyLoss.forward", "# First with gradients", "t, r = r, t  # First"),
        ("ConsistencyLoss.forward", "self.point(x, x0, noise, t, r,", "self.point(x, x0, noise, r, t,"),
        ("ConsistencyLoss.forward", "self.weight(t, r, scaling)", "self.weight(r, t, scaling)"),
        ("ConsistencyLoss.forward", "self.gap(t, progress)", "t - self.gap(t, progress)"),
        ("ConsistencyLoss.forward", "with repeating(draws,", "with repeating(network_draws(x.device),"),
        ("ContinuousConsistencyLoss.forward", "(slope, torch.ones_like(t))", "(slope, torch.zeros_like(t))"),
        ("ContinuousConsistencyLoss.forward", "(estimate - per", "(estimate + per"),
        ("ContinuousConsistencyLoss.forward", "* v).detach()", "* v)"),
    ],
    f"{CORE}/consistency_parts.py": [
        ("TeacherStep.__call__", "per_sample(r - t, x)", "per_sample(t - r, x)"),
        ("InverseGap.__call__", "return 1 / (t - r)", "return 1 / t"),
    ],
    f"{CORE}/meanflow_loss.py": [
        ("directional_derivative", "torch.no_grad(),", "torch.enable_grad(),"),  # gradients through the target
        ("directional_derivative", "repeating(network_draws(device), device)", "torch.no_grad()"),  # other dropout
        ("MeanFlowLoss.forward", "else levels.unbind(1)", "else levels.flip(1).unbind(1)"),  # r and t swapped
        ("mean_flow_target", "for level in (sigma, until))", "for level in (until, sigma))"),
        ("mean_flow_target", ": denoiser.average(x, sigma, until,", ": denoiser.average(x, sigma, sigma,"),
        ("MeanFlowLoss.forward", "= denoiser.average(x, sigma, until,", "= denoiser.average(x, sigma, sigma,"),
        (
            "MeanFlowLoss.forward",
            "clean = self.guidance.clean(",
            "x0 = self.guidance.clean(",
        ),  # no effect
        ("LevelPairs.sample", "torch.where(equal, sigma, until)", "torch.where(equal, until, sigma)"),
        ("AdaptiveWeight.forward", "(error.detach() + self", "(error + self"),
        ("AdaptiveWeight.forward", "((1 - weight) * error).detach()", "((1 - weight) * error)"),
        ("TrainingGuidance.clean", "torch.where(per_sample(acts, x0), guided, x0)", "guided"),
    ],
}
CPU_SECONDS = 300
SWAPS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult}

Setter = Callable[[ast.AST], None]  # puts another node in a node's place
Place = tuple[ast.expr, ast.AST, Setter]  # a node that computes, what it is part of, and its setter


@dataclass(frozen=True)
class Mutant:
    """One change: the file, the function, the line, what was there and what is there now, and the whole new source."""

    path: str
    function: str
    line: int
    before: str
    after: str
    source: str


def changes(node: ast.AST, parent: ast.AST) -> Iterator[ast.expr]:
    """What may be put in a node's place."""
    if isinstance(node, ast.BinOp) and type(node.op) in SWAPS:
        changed = copy.deepcopy(node)
        changed.op = SWAPS[type(node.op)]()
        yield changed
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield node.operand
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        option = isinstance(parent, ast.keyword) and isinstance(node.value, float)
        if option or isinstance(parent, ast.BinOp | ast.UnaryOp | ast.Tuple):
            yield ast.Constant(node.value * 1.05 or 0.05)


def arithmetic(node: ast.AST, parent: ast.AST | None = None, setter: Setter | None = None) -> Iterator[Place]:
    """Every node that computes, with what puts another in its place; not indices, comparisons and annotations."""
    if isinstance(node, ast.JoinedStr | ast.arguments | ast.Subscript | ast.Raise | ast.Compare):
        return
    if isinstance(node, ast.BinOp | ast.UnaryOp | ast.Constant) and parent is not None and setter is not None:
        yield node, parent, setter
    for field, value in ast.iter_fields(node):
        if field in ("returns", "annotation", "decorator_list"):
            continue
        if isinstance(value, ast.AST):
            yield from arithmetic(value, node, partial(setattr, node, field))
        elif isinstance(value, list):
            for index, item in enumerate(value):
                if isinstance(item, ast.AST):
                    yield from arithmetic(item, node, partial(value.__setitem__, index))


def functions(tree: ast.Module) -> Iterator[tuple[str, ast.stmt]]:
    """Functions, methods and tables of numbers, by name."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield node.name, node
        elif isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef):
                    yield f"{node.name}.{inner.name}", inner
        elif isinstance(node, ast.Assign):
            yield ast.unparse(node.targets[0]), node


def mutants(path: str) -> Iterator[Mutant]:
    """All mutants of a file."""
    text = (ROOT / path).read_text()
    for name, before, after in BY_HAND.get(path, []):
        if text.count(before) != 1:
            sys.exit(f"{path} holds {before!r} {text.count(before)} times and not once; mend BY_HAND.")
        line = text[: text.index(before)].count("\n") + 1
        yield Mutant(path, name, line, before, after, text.replace(before, after))
    tree = ast.parse(text)
    for name, function in functions(tree):
        for node, parent, put in list(arithmetic(function)):
            for changed in changes(node, parent):
                context = parent if isinstance(node, ast.Constant) else node  # a number alone says little
                before = ast.unparse(context)
                put(changed)
                after = ast.unparse(parent if isinstance(node, ast.Constant) else changed)
                yield Mutant(path, name, node.lineno, before, after, ast.unparse(ast.fix_missing_locations(tree)))
                put(node)


class Planted(Loader):
    """An importer that gives one module another source."""

    def __init__(self, name: str, path: str, source: str) -> None:
        self.name, self.path, self.source = name, path, source

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        return importlib.util.spec_from_loader(name, self, origin=self.path, is_package=False)

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        module.__file__ = self.path
        exec(compile(self.source, self.path, "exec"), module.__dict__)


def verdict(mutant: Mutant) -> str:
    """Runs the tests on a mutant in a forked process: 'caught', 'hangs' (it never passes either) or 'survived'."""
    pid = os.fork()
    if pid == 0:
        import pytest

        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        module = mutant.path.removesuffix(".py").replace("/", ".")
        sys.meta_path.insert(0, Planted(module, str(ROOT / mutant.path), mutant.source))
        files = [str(ROOT / "tests/diffusion" / name) for name in TESTS[mutant.path]]
        os._exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT), *files])))
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return "survived" if code == 0 else "hangs" if code == -signal.SIGKILL else "caught"


def report(results: list[tuple[Mutant, str]]) -> bool:
    """The table: one line per function, then the survivors."""
    counts: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for mutant, result in results:
        counts[mutant.path, mutant.function][0] += 1
        counts[mutant.path, mutant.function][1] += result != "survived"
    print(f"\n{'file':36} {'function':40} planted  caught")
    for (path, function), (planted, caught) in counts.items():
        print(f"{path.removeprefix(CORE + '/'):36} {function:40} {planted:7} {caught:7}")
    survivors = [mutant for mutant, result in results if result == "survived"]
    print(f"{'all':77} {len(results):7} {len(results) - len(survivors):7}")
    for mutant in survivors:
        print(f"survived: {mutant.path}:{mutant.line} {mutant.function}: {mutant.before}  ->  {mutant.after}")
    return not survivors


def main() -> None:
    """Plants, runs and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="functions, classes or files to plant in; all by default")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time")
    parser.add_argument("--list", action="store_true", help="print what would be planted, and stop")
    arguments = parser.parse_args()
    planted = [
        mutant
        for path in TESTS
        for mutant in mutants(path)
        if mutant.function not in SKIP
        and (mutant.function, mutant.after) not in EQUIVALENT
        and (
            not arguments.only or {mutant.function, mutant.function.split(".")[0], Path(path).name} & {*arguments.only}
        )
    ]
    if arguments.list:
        for mutant in planted:
            print(f"{mutant.path}:{mutant.line} {mutant.function}: {mutant.before}  ->  {mutant.after}")
        return
    if not planted:
        sys.exit(f"No arithmetic to change in {' '.join(arguments.only)}; --list shows where there is.")
    os.environ["OMP_NUM_THREADS"] = "1"
    os.chdir(ROOT)
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import pytest  # noqa: F401  (imported here so that no fork has to)
    import torch  # noqa: F401

    for path in dict.fromkeys(mutant.path for mutant in planted):
        whole = Mutant(path, "", 0, "", "", (ROOT / path).read_text())
        if verdict(whole) != "survived":
            sys.exit(f"The tests of {path} fail on the code as it is, so that they would catch anything.")
    with ThreadPoolExecutor(arguments.jobs) as pool:
        results = []
        for mutant, result in zip(planted, pool.map(verdict, planted), strict=True):
            results.append((mutant, result))
            print("." if result == "caught" else result[0].upper(), end="", flush=True)
    sys.exit(0 if report(results) else 1)


if __name__ == "__main__":
    main()
