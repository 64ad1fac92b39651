"""What is installed and how it is found: the wheel's files, configurations by name, the package's names."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import diffusion_lit
from diffusion_lit.commands import configs, doctor
from diffusion_lit.commands import main as cli
from diffusion_lit.runtime import installation

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import check_wheel  # noqa: E402


def said(capsys, *args, status=2):
    """What a command says that must stop."""
    with pytest.raises(SystemExit) as caught:
        cli.main(list(args))
    assert caught.value.code == status
    return capsys.readouterr().err


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="compares with what git tracks")
def test_the_wheel_holds_every_tracked_file_of_the_package_and_nothing_else(tmp_path):
    sdist, wheel = check_wheel.build(tmp_path)
    wanted = {
        path.as_posix() for path in check_wheel.tracked(ROOT) if path.parts[0] in ("diffusion_lit", "datamodules")
    }
    wanted |= {f"diffusion_lit/{path.as_posix()}" for path in check_wheel.tracked(ROOT) if path.parts[0] == "configs"}
    assert len([name for name in wanted if name.startswith("diffusion_lit/configs/")]) > 40
    with zipfile.ZipFile(wheel) as file:
        held = {name for name in file.namelist() if ".dist-info/" not in name}
        for name in held:
            source = ROOT / (name.removeprefix("diffusion_lit/") if "/configs/" in name else name)
            assert file.read(name) == source.read_bytes(), name
    assert held == wanted
    with tarfile.open(sdist) as file:
        packed = {name.partition("/")[2] for name in file.getnames()}
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE", "configs/nets/unet_32_t.yaml"} <= packed


def installed_at(folder, monkeypatch):
    """As if the package lay in this folder as a wheel puts it: configs inside, no pyproject beside."""
    package = folder / "diffusion_lit"
    shutil.copytree(ROOT / "configs", package / "configs")
    monkeypatch.setattr(configs, "PACKAGE", package)
    return package / "configs"


@pytest.mark.parametrize("name", ["edm_digits", "edm_digits.yaml", "configs/edm_digits.yaml", "configs/edm_digits"])
def test_a_name_finds_what_comes_with_the_package_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert configs.find_config(name) == ROOT / "configs/edm_digits.yaml"
    assert configs.with_configs_found(["fit", "--config", name, f"--config={name}", "-c", name, "--name", name]) == [
        *["fit", "--config", str(ROOT / "configs/edm_digits.yaml"), f"--config={ROOT}/configs/edm_digits.yaml"],
        *["-c", str(ROOT / "configs/edm_digits.yaml"), "--name", name],
    ]
    inside = installed_at(tmp_path / "site", monkeypatch)
    assert configs.find_config(name) == inside / "edm_digits.yaml"
    own = tmp_path / name
    own.parent.mkdir(exist_ok=True)
    own.write_text("trainer: {max_steps: 1}")
    assert configs.find_config(name) == own


def test_a_folder_of_the_name_of_a_config_does_not_hide_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "edm_digits").mkdir()
    (tmp_path / "configs").mkdir()
    assert configs.find_config("edm_digits") == configs.find_config("configs/edm_digits.yaml")
    assert configs.find_config("paper/edm_cifar10") == ROOT / "configs/paper/edm_cifar10.yaml"


@pytest.mark.parametrize("name", ["edm_digit", "configs/edm_digit.yaml", "", ".", "no/such.yaml"])
def test_a_config_that_does_not_exist_is_told_with_what_may_be_meant(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    told = said(capsys, "fit", "--config", name)
    assert f"no config {name}" in told and "diffusion-lit configs" in told
    if "edm_digit" in name:
        assert "edm_digits" in told


def test_a_run_without_a_config_is_told_how_to_name_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    told = said(capsys, "fit")
    assert "fit.model" in told and "--config NAME" in told and "diffusion-lit configs" in told


def test_a_run_without_base_yaml_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (installed_at(tmp_path, monkeypatch) / "base.yaml").unlink()
    told = said(capsys, "fit", "--config", str(ROOT / "configs/edm_digits.yaml"), "--trainer.max_steps=1")
    assert str(tmp_path / "diffusion_lit/configs/base.yaml") in told and "install" in told
    assert not (tmp_path / "runs").exists() and not (tmp_path / "lightning_logs").exists()
    monkeypatch.setattr(configs, "PACKAGE", tmp_path / "site-packages" / "diffusion_lit")
    shutil.copytree(
        ROOT / "configs", tmp_path / "site-packages" / "configs"
    )  # another package's, as far as can be told
    assert "base.yaml" in said(capsys, "fit", "--config", "edm_digits")


def test_the_base_is_read_from_a_folder_with_brackets_in_its_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    installed_at(tmp_path / "a [b] *", monkeypatch)
    with pytest.raises(SystemExit) as caught:
        cli.main(["fit", "--config", "edm_cifar10", "--print_config"])
    assert not caught.value.code
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["trainer"]["devices"] == 1 and config["trainer"]["use_distributed_sampler"] is False
    assert config["trainer"]["logger"]["init_args"]["save_dir"] == "runs"
    assert config["model"]["init_args"]["net"]["class_path"] == "diffusion_lit.nets.UNet"


def test_configs_are_listed_with_their_first_line_and_copied_with_what_they_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cli.main(["configs"])
    listed = capsys.readouterr().out
    for path in (ROOT / "configs").glob("*_*.yaml"):
        first = path.read_text().splitlines()[0].removeprefix("# ")
        assert any(line.split() == [path.stem, *first.split()] for line in listed.splitlines()), path
    assert "\npaper/edm_cifar10 " in listed and "base " not in listed and "unet" not in listed.split("They lie")[0]
    cli.main(["configs", "--copy", "edm_cifar10"])
    for name in ("edm_cifar10.yaml", "nets/unet_32_sigma.yaml"):
        assert (tmp_path / name).read_bytes() == (ROOT / "configs" / name).read_bytes()
    assert configs.find_config("edm_cifar10") == tmp_path / "edm_cifar10.yaml"
    (tmp_path / "edm_cifar10.yaml").write_text("mine")
    capsys.readouterr()
    assert "edm_cifar10.yaml exists" in said(capsys, "configs", "--copy", "configs/edm_cifar10.yaml", "--out", ".")
    assert (tmp_path / "edm_cifar10.yaml").read_text() == "mine"
    assert "no config edm_cifar11" in said(capsys, "configs", "--copy", "edm_cifar11")


def test_a_copy_of_a_papers_config_leaves_the_one_that_it_changes_in_sight(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cli.main(["configs", "--copy", "paper/edm_cifar10"])
    given = "--config configs/edm_cifar10.yaml --config paper/edm_cifar10.yaml"
    assert f"Train it: diffusion-lit fit {given}\n" in capsys.readouterr().out
    assert configs.find_config("edm_cifar10") == ROOT / "configs/edm_cifar10.yaml"
    with pytest.raises(SystemExit) as caught:
        cli.main(["fit", *given.split(), "--print_config"])
    assert not caught.value.code and "DDPMpp" in capsys.readouterr().out
    cli.main(["configs", "--copy", "studies/sweep", "--out", "mine"])
    assert "diffusion-lit fit" not in capsys.readouterr().out and (tmp_path / "mine/studies/sweep.yaml").is_file()
    cli.main(["configs", "--copy", "edm_digits"])
    assert "Train it: diffusion-lit fit --config edm_digits.yaml\n" in capsys.readouterr().out


def test_importing_the_package_imports_nothing_heavy_and_its_names_are_there():
    code = (
        "import sys, time; start = time.perf_counter(); import diffusion_lit; took = time.perf_counter() - start;"
        "assert not {'torch', 'lightning', 'numpy', 'yaml'} & set(sys.modules), 'heavy'; assert took < 0.1, took;"
        "assert set(diffusion_lit.__all__) <= set(dir(diffusion_lit));"
        "from diffusion_lit.commands.main import main; main(['--help']); main(['configs']);"
        "assert not {'torch', 'lightning'} & set(sys.modules), 'heavy';"
    )
    for _ in range(3):  # a busy machine may take longer once
        done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True)
        if done.returncode == 0:
            break
    assert done.returncode == 0


def test_the_names_are_those_of_their_homes():
    from diffusion_lit import SAMPLERS, Sampling, editing, load_model
    from diffusion_lit.diffusion import editing as editing_itself
    from diffusion_lit.diffusion.generate import Sampling as SamplingItself
    from diffusion_lit.diffusion.samplers import SAMPLERS as SAMPLERS_ITSELF

    assert (SAMPLERS, Sampling, editing) == (SAMPLERS_ITSELF, SamplingItself, editing_itself)
    assert load_model.__name__ == "load_model"
    for name in diffusion_lit.__all__:
        assert getattr(diffusion_lit, name) is not None
    with pytest.raises(AttributeError, match="no_such"):
        _ = diffusion_lit.no_such


def test_the_version_is_printed_and_is_that_of_the_distribution(capsys):
    cli.main(["--version"])
    assert capsys.readouterr().out == f"diffusion-lit {diffusion_lit.__version__}\n"


@pytest.mark.parametrize("name", ["lightning", "diffusion-lit"])
def test_messages_begin_with_the_name_that_was_typed(name, tmp_path):
    (tmp_path / name).write_text("from diffusion_lit.commands.main import main\nmain()\n")
    for words, begun in ((["trian"], f"{name}: There is no command 'trian'"), (["--help"], f"usage: {name} COMMAND")):
        run = [sys.executable, str(tmp_path / name), *words]
        done = subprocess.run(run, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
        assert (done.stderr if words == ["trian"] else done.stdout).startswith(begun)


@pytest.mark.parametrize("shape", ["file", "package", "folder"])
def test_files_that_hide_the_datamodules_are_told(shape, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if shape == "file":
        (tmp_path / "datamodules.py").write_text("")
    else:
        (tmp_path / "datamodules").mkdir()
    if shape == "package":
        (tmp_path / "datamodules/__init__.py").write_text("")
    if shape == "folder":  # found before an editable install alone: nothing of the name on the path
        monkeypatch.setattr(sys, "path", [str(tmp_path)])
    else:
        monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "modules", {name: one for name, one in sys.modules.items() if name != "datamodules"})
    told = said(capsys, "fit", "--config", "edm_digits")
    assert str(tmp_path / "datamodules") in told and "rename" in told


def test_a_command_lightning_of_another_package_is_told(tmp_path, monkeypatch, capsys):
    script = tmp_path / "lightning"
    script.write_text("#!/bin/sh\nexec python -m lightning_sdk.cli\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert str(script) in installation.foreign_lightning() and "diffusion-lit" in installation.foreign_lightning()
    cli.main(["--help"])
    assert str(script) in capsys.readouterr().out
    script.write_text("#!/usr/bin/python\nfrom diffusion_lit.commands.main import main\n")
    assert installation.foreign_lightning() is None
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert installation.foreign_lightning() is None


def test_the_doctor_says_what_is_there_and_what_would_be_chosen(tmp_path, monkeypatch, capsys):
    import torch

    from diffusion_lit.runtime.hardware import bf16_pays

    monkeypatch.setenv("DIFFUSION_LIT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache/latents").mkdir(parents=True)
    (tmp_path / "cache/latents/a").write_bytes(bytes(3 * 1024**2))
    monkeypatch.setattr(
        doctor, "requires", lambda _: ["torch>=2", 'wandb[media]>=1; extra == "a"', 'pip; extra == "b"']
    )
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "wandb" else "1.2")
    cli.main(["doctor"])
    told = {" ".join(line.split()) for line in capsys.readouterr().out.splitlines()}
    assert f"{tmp_path}/cache/latents 3 MiB" in told
    assert {"a missing: wandb", "b pip 1.2", f"diffusion-lit {diffusion_lit.__version__}", "torch 1.2"} <= told
    assert f"configs {ROOT}/configs" in told
    if not torch.cuda.is_available():
        precision = "bf16-mixed" if bf16_pays("cpu") else "32-true"
        assert f"precision training in {precision}, figures in 32-true" in told


def test_the_shell_completes_commands_options_and_configs(capsys, tmp_path):
    pytest.importorskip("shtab")
    cli.main(["completion", "bash"])
    (tmp_path / "script").write_text(capsys.readouterr().out)
    asked = [["diffusion-lit", "sam"], ["lightning", "fit", "--config", "edm_digi"], ["diffusion-lit", "edit", "inp"]]
    asked += [["lightning", "sample", "--num_st"], ["diffusion-lit", "fit", "--trainer.max_s"]]
    lines = [f"source {tmp_path}/script"]
    for words in asked:
        given = " ".join(words)
        lines += [f"COMP_WORDS=({given}); COMP_CWORD={len(words) - 1}; COMPREPLY=()"]
        lines += [f"_shtab_{words[0].replace('-', '_')}; echo ${{COMPREPLY[*]}}"]
    done = subprocess.run(["bash", "-c", "\n".join(lines)], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.split("\n")[:5] == ["sample", "edm_digits", "inpaint", "--num_steps", "--trainer.max_steps"]
