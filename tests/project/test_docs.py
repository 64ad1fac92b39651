"""README and docs: every command parses, every link leads somewhere, every addition works as printed."""

import ast
import functools
import importlib
import importlib.util
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from renew_docs import CONFIGS, PAGES, ROOT, header, problems, renewed

import experiments
from diffusion_lit.commands import edit
from diffusion_lit.commands import main as cli
from diffusion_lit.diffusion import samplers
from experiments.harness import runs

EXTEND = ROOT / "docs/extend.md"
SAMPLERS, EDIT = "diffusion_lit/diffusion/samplers/__init__.py", "diffusion_lit/commands/edit.py"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
PROGRAMS = ("lightning ", "python -m ", "make ", "pytest ")
QUIET = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
SHORT = [
    *[*QUIET, "--trainer.max_steps=2", "--trainer.val_check_interval=2", "--data.init_args.batch_size=8"],
    "--trainer.limit_val_batches=2",
    *[
        "--sample_grid.rows=1",
        "--sample_grid.columns=1",
        "--trajectory.count=1",
        "--model.init_args.sampling.num_steps=2",
    ],
]


def blocks(page, language):
    """The fenced blocks of a language."""
    return [text for kind, text in FENCE.findall(page.read_text()) if kind == language]


def files(page):
    """The files that a page prints: a paragraph that begins with a file's name, and the block after it."""
    form = r"^`([\w./]+\.(?:py|yaml))`(?:(?!\n\n).)*\n\n```(\w+)\n(.*?)^```"
    return {(name, kind): text for name, kind, text in re.findall(form, page.read_text(), re.MULTILINE | re.DOTALL)}


def commands(page):
    """Every command line that a page prints, in a block or in a line of text, without comments and launchers."""
    text = page.read_text()
    lines = "\n".join(body for kind, body in FENCE.findall(text) if not kind).replace("\\\n", " ").splitlines()
    lines += re.findall(r"`([^`]+)`", FENCE.sub("", text))
    for line in lines:
        words = " ".join(re.sub(r"\s#\s.*", "", line).split())
        words = re.sub(r"(^|[ /])diffusion-lit ", r"\1lightning ", words)  # the command's first name
        start = re.search(r"(?:^|torchrun .*?|srun )(?:\.venv/bin/)?(lightning .*)", words)
        words = start[1] if start else words
        if words.startswith(PROGRAMS) and "NAME" not in words and "..." not in words.split(" ")[1]:
            yield words


PRINTED = sorted({command for page in PAGES for command in commands(page)})


def changed(name):
    """The names that a file of the project defines with the lines that docs/extend.md adds to it."""
    module = importlib.import_module(name.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
    source, above = (ROOT / name).read_text(), None
    for line in files(EXTEND)[name, "diff"].splitlines():
        if line.startswith("+"):
            source = source.replace(f"{above}\n", f"{above}\n{line[1:]}\n", 1)
        else:
            above = line[1:]
            assert source.count(f"{above}\n") == 1
    names = {"__name__": module.__name__}
    exec(compile(source, name, "exec"), names)
    return names


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of one's own beside the project's configs, with what docs/extend.md adds to it and to the project."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "configs").symlink_to(ROOT / "configs")
    with pytest.MonkeyPatch.context() as patch:
        for (name, kind), text in files(EXTEND).items():
            if kind == "diff" or name.startswith("experiments/"):
                continue
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
            if "/" in name:
                package = importlib.import_module(str(Path(name).parent).replace("/", "."))
                patch.setattr(package, "__path__", [*package.__path__, str((folder / name).parent)])
        for name, table in {SAMPLERS: samplers.SAMPLERS, EDIT: edit.TASKS}.items():
            for key, value in changed(name)["SAMPLERS" if name == SAMPLERS else "TASKS"].items():
                if key not in table:
                    patch.setitem(table, key, value)
        yield folder


@pytest.fixture(scope="module")
def trained(folder):
    """That folder with the two trainings that the page prints, of two steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for words in printed("fit"):
            cli.main([*words, *SHORT])
    return folder


@pytest.fixture
def own(folder, monkeypatch):
    """Works in that folder; what is imported from it is forgotten afterwards."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    known = set(sys.modules)
    yield folder
    for name in set(sys.modules) - known:
        if str(folder) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_the_pages_print_what_they_should():
    assert {"lightning", "python", "make"} <= {command.split()[0] for command in PRINTED}
    assert len(PRINTED) > 20
    assert {name for name, _ in files(EXTEND)} == {
        *["shapes.py", "edm_shapes.yaml", "film.py", "film_net.yaml", "experiments/batch_sizes.py"],
        *["diffusion_lit/modules/flow.py", "flow_digits.yaml"],
        *["diffusion_lit/commands/variations.py", "diffusion_lit/commands/edit.py"],
        *["diffusion_lit/diffusion/samplers/midpoint.py", "diffusion_lit/diffusion/samplers/__init__.py"],
    }


@pytest.mark.parametrize("command", [line for line in PRINTED if line.startswith("lightning ")])
def test_commands_of_lightning_parse(command, own, monkeypatch, capsys):
    words = shlex.split(command)[1:]
    known = {*cli.TRAINING, *cli.COMMANDS, "--help"}
    assert words[0] in known
    if words[0] in cli.TRAINING and "--config" in words:
        words.append("--print_config")
    elif words[0] in cli.COMMANDS and len(words) > 1 and words[1] != "TASK":
        parse = cli._run_function
        monkeypatch.setattr(cli, "_run_function", lambda function, *rest: parse(idle(function), *rest))
    else:
        return
    try:
        cli.main(words)
    except SystemExit as stopped:
        assert stopped.code == 0, capsys.readouterr().err


def idle(function):
    """A function that is called like another and does nothing."""

    @functools.wraps(function)
    def nothing(*args, **kwargs):
        return None

    return nothing


def test_a_command_with_a_wrong_option_would_not_parse(own, monkeypatch):
    for wrong in ("lightning fit --config configs/edm_digits.yaml --modle x", "lightning sample --ckpt_pth x"):
        with pytest.raises(SystemExit, match="2"):
            cli.main([*shlex.split(wrong)[1:], *(["--print_config"] if " fit " in wrong else [])])
    with pytest.raises(AssertionError):
        test_commands_of_lightning_parse("lightning trian --config configs/edm_digits.yaml", own, monkeypatch, None)


@pytest.mark.parametrize("command", [line for line in PRINTED if not line.startswith("lightning ")])
def test_other_commands_exist(command):
    words = shlex.split(command)
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert all(word in targets or "=" in word for word in words[1:])
    elif words[0] == "pytest":
        assert all((ROOT / word).exists() for word in words[1:] if word.startswith("tests"))
    else:
        printed = [text for (name, _), text in files(EXTEND).items() if name == f"{words[2].replace('.', '/')}.py"]
        source = printed[0] if printed else Path(importlib.util.find_spec(words[2]).origin).read_text()
        source += (ROOT / "experiments/harness/study.py").read_text() if "experiments.harness.study" in source else ""
        for option in re.findall(r"--(\w+)(?= |$|=)", command):
            assert re.search(rf"\b{option}\b", source), f"{words[2]} has no option --{option}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page):
    text = FENCE.sub("", page.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http:", "https:")):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{page.name} links to {target}"
        if anchor and there.suffix == ".md":
            titles = re.findall(r"^#+ (.*)", there.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
    assert problems(page) == []


def test_recipes_claim_what_the_configs_say():
    page = (ROOT / "docs/recipes.md").read_text()
    for config in CONFIGS:
        fields = header(config)
        assert {"", "Run", "Cost", "Expect"} <= fields.keys()
        (row,) = re.findall(rf"^\| \[{config.stem}\]\(\.\./configs/{config.name}\) \| (.*) \|$", page, re.MULTILINE)
        numbers = (set(re.findall(r"\d[\d.,]*\d|\d", text)) for text in (row, " ".join(fields.values())))
        claimed, said = numbers
        assert claimed <= said, f"docs/recipes.md claims {claimed - said} of {config.name}: make docs"
    for config in (ROOT / "configs/paper").glob("*.yaml"):
        assert f"configs/paper/{config.name}" in page


def test_a_link_that_rots_is_found_and_renewed(tmp_path):
    lines = ["import os", *[""] * 50, "class Thing:", "    def method(self):", "        pass", "", "CONSTANT = 3"]
    (tmp_path / "code.py").write_text("\n".join(lines))
    page = tmp_path / "page.md"
    page.write_text("[`Thing.method`](code.py#L1) [`CONSTANT`](code.py#L50) [`Gone`](code.py#L1) [`x`](lost.py#L1)\n")
    said = problems(page)
    assert len(said) == 3
    for words in ("Thing.method is defined in line 53", "code.py defines no Gone", "lost.py, which is not there"):
        assert any(words in sentence for sentence in said)
    page.write_text(renewed(page))
    assert "[`Thing.method`](code.py#L53) [`CONSTANT`](code.py#L56) [`Gone`](code.py#L1)" in page.read_text()


def test_the_python_of_the_tour_runs(capsys):
    exec(compile("\n".join(blocks(ROOT / "docs/tour.md", "python")), "tour.md", "exec"), {})
    assert "heun: standard deviation 0.5" in capsys.readouterr().out


def test_what_the_python_of_the_readme_imports_is_there():
    for block in blocks(ROOT / "README.md", "python"):
        for node in ast.walk(ast.parse(block)):
            for name in node.names if isinstance(node, ast.ImportFrom) else ():
                there = hasattr(importlib.import_module(node.module), name.name)
                assert there or importlib.util.find_spec(f"{node.module}.{name.name}"), name.name


def printed(start):
    """The printed commands of docs/extend.md that begin so, in their order."""
    return [shlex.split(line)[1:] for line in commands(EXTEND) if line.startswith(f"lightning {start} ")]


@pytest.mark.slow
def test_a_data_set_and_a_network_of_ones_own(trained, own, capsys):
    samples = printed("sample")
    for words in (one for one in samples if "midpoint" not in one):
        cli.main([*words, "--device=cpu"])
    (evaluate,) = printed("evaluate")
    small = ["--num_samples=20", "--num_blocks=1", "--extractor=pixels", "--accelerator=cpu", "--out=e.json"]
    cli.main([*evaluate, *small])
    (report,) = printed("report")
    cli.main(report)
    assert "16 samples" in capsys.readouterr().out
    for name in ("edm_shapes", "film_net"):
        assert (own / f"runs/{name}/version_0/checkpoints/last.ckpt").is_file()
    assert "Shapes" in (own / "runs/edm_shapes/version_0/report.html").read_text()


@pytest.mark.slow
def test_a_sampler_of_ones_own(trained, own, capsys):
    (words,) = (words for words in printed("sample") if "midpoint" in words)
    cli.main([*words, "--num_samples=2", "--device=cpu"])
    assert "2 samples, 23 denoiser calls each" in capsys.readouterr().out
    (check,) = (block for block in blocks(EXTEND, "python") if "order =" in block)
    exec(compile(check, "extend.md", "exec"), {})


@pytest.mark.slow
def test_a_family_and_an_edit_task_of_ones_own(trained, own, capsys):
    assert "flow.Flow" in (own / "runs/flow_digits/version_0/config.yaml").read_text()
    (words,) = printed("edit")
    cli.main([*words, "--num_steps=2", "--num_samples=2", "--device=cpu"])
    assert "variations: figure.png" in capsys.readouterr().out
    made = [(own / f"runs/edits/variations/result_{number}.png").read_bytes() for number in range(2)]
    assert made[0] != made[1]


def test_a_data_set_is_a_class_of_40_lines():
    (shapes,) = (
        node for node in ast.parse(files(EXTEND)["shapes.py", "python"]).body if isinstance(node, ast.ClassDef)
    )
    assert shapes.end_lineno - shapes.lineno < 40


@pytest.mark.slow
def test_a_study_of_ones_own(own, tmp_path, monkeypatch):
    (tmp_path / "batch_sizes.py").write_text(files(EXTEND)["experiments/batch_sizes.py", "python"])
    monkeypatch.setattr(experiments, "__path__", [*experiments.__path__, str(tmp_path)])
    monkeypatch.setenv("DIFFUSION_LIT_CACHE", str(own / "cache"))

    def run(self, command, stdout, **options):
        cli.main(command[len(runs.COMMAND) :])
        return 0

    monkeypatch.setattr(runs.Children, "run", run)  # in this process
    small = ["--sizes=[8, 16]", "--images=32", "--num_samples=20", "--extractor=pixels", "--device=cpu", *QUIET]
    monkeypatch.setattr(sys, "argv", ["batch_sizes.py", *small, "--model.init_args.sampling.num_steps=2"])
    runpy.run_module("experiments.batch_sizes", run_name="__main__")
    page = (own / "runs/studies/batch_sizes/index.html").read_text()
    assert "After 32 images batches of" in page


@pytest.mark.slow
def test_the_additions_run_as_printed(folder, tmp_path):
    """In a copy of the project, through the installed command, nothing changed and nothing left out."""
    for name in ("diffusion_lit", "datamodules", "experiments", "configs", "pyproject.toml"):
        subprocess.run(["cp", "-r", ROOT / name, tmp_path / name], check=True)
    for (name, kind), text in files(EXTEND).items():
        if kind != "diff":
            (tmp_path / name).write_text(text)
            continue
        lines = (tmp_path / name).read_text().splitlines()
        for context, added in re.findall(r"^ (.*)\n\+(.*)", text, re.MULTILINE):
            lines.insert(lines.index(context) + 1, added)
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    for command in commands(EXTEND):
        words = shlex.split(command)
        if words[0] == "lightning" and len(words) > 2:  # not where a line of text names a command
            words = [sys.executable, "-c", "from diffusion_lit.commands.main import main; main()", *words[1:]]
        elif words[:3] == ["python", "-m", "experiments.batch_sizes"]:
            words[0] = sys.executable
        else:
            continue
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert (tmp_path / "runs/studies/batch_sizes/index.html").is_file()
