"""The configurations that come with the package: where they lie, how a name finds one, and a copy to edit.

An installation holds them as `diffusion_lit/configs`, a clone as its top-level folder `configs`.
"""

import contextlib
import difflib
import re
import shutil
from pathlib import Path
from typing import Any

import yaml

PACKAGE = Path(__file__).resolve().parent.parent
PARTS = ("base.yaml", "nets")  # parts of experiments, not experiments


def configs_folder() -> Path:
    """The folder of the configurations.

    Returns:
        The installed package's, or that of the clone which the package lies in.

    Raises:
        ValueError: If there is none with a base.yaml that can be read.
    """
    inside, beside = PACKAGE / "configs", PACKAGE.parent / "configs"
    clone = beside if (PACKAGE.parent / "pyproject.toml").is_file() else None
    folder = inside if inside.is_dir() or clone is None else clone
    base = folder / "base.yaml"
    try:
        base.read_bytes()
    except OSError as error:
        raise ValueError(
            f"{base}, which every experiment starts from, cannot be read ({error.strerror}); the installation is "
            "incomplete: install diffusion-lit again."
        ) from error
    return folder


def config_names() -> list[str]:
    """Names of the experiments: `edm_digits`, ..., `paper/edm_cifar10`, ..."""
    folder = configs_folder()
    paths = [path.relative_to(folder) for path in folder.rglob("*.yaml")]
    names = [path.with_suffix("").as_posix() for path in paths if path.parts[0] not in PARTS]
    return sorted(names, key=lambda name: ("/" in name, name))


def find_config(name: str) -> Path:
    """A configuration's file: one of the user's own first, then one that comes with the package.

    Args:
        name: `edm_digits`, `edm_digits.yaml`, `configs/edm_digits.yaml`, or the path of any YAML.

    Returns:
        Its whole path.

    Raises:
        ValueError: If there is none.
    """
    given = Path(name).expanduser()
    folder = configs_folder()
    inside = Path(*given.parts[1:]) if given.parts[:1] == ("configs",) else given
    for path in (given, folder / inside):
        for candidate in (path, path.with_name(f"{path.name}.yaml") if path.name else path):
            if candidate.is_file():
                return candidate.resolve()
    near = difflib.get_close_matches(inside.as_posix().removesuffix(".yaml"), config_names(), n=3, cutoff=0.5)
    guess = f"; did you mean {' or '.join(near)}?" if near else "."
    raise ValueError(
        f"There is no config {name}{guess} `diffusion-lit configs` lists those that come with the package."
    )


def with_configs_found(args: list[str]) -> list[str]:
    """Replaces each configuration's name on a command line by the file's path.

    Args:
        args: A command line. YAML text given instead of a name is kept.

    Returns:
        It, with whole paths.

    Raises:
        ValueError: If a configuration does not exist.
    """
    found, expected = [], False
    for arg in args:
        option, equals, value = arg.partition("=")
        if expected:
            found.append(_found(arg))
        elif equals and option in ("--config", "-c"):
            found.append(f"{option}={_found(value)}")
        else:
            found.append(arg)
        expected = not expected and arg in ("--config", "-c")
    return found


def _found(name: str) -> str:
    inline = "\n" in name or ": " in name or name.startswith("{")
    return name if inline else str(find_config(name))


def keys_given(files: list[Any], words: list[str]) -> list[set[str]]:
    """What a user has set: the keys of each configuration file, `trainer.max_steps` for one of a part, in order.

    Args:
        files: The files; one that cannot be read is left out.
        words: The command line, which wins over them.

    Returns:
        The keys of each file, and last those of the command line.
    """
    given = []
    for file in files:
        with contextlib.suppress(OSError, yaml.YAMLError, AttributeError, TypeError):  # of no mapping
            content = yaml.safe_load(Path(str(file)).read_text())
            given.append({*content.keys(), *(f"trainer.{name}" for name in content.get("trainer") or {})})
    return [*given, {word.partition("=")[0].removeprefix("--") for word in words}]


def configs(copy: str | None = None, out: str = ".") -> None:
    """Lists the configurations that come with the package, or copies one to edit.

    Args:
        copy: Name of the one to copy, such as edm_digits.
        out: Folder that it is copied to, with the files that it names.
    """
    folder = configs_folder()
    if copy is None:
        width = max(len(name) for name in config_names())
        for name in config_names():
            print(f"{name:<{width}}  {_first_line(folder / f'{name}.yaml')}")
        print(f"\nThey lie in {folder}. Train one: diffusion-lit fit --config NAME")
        print("Copy one to edit: diffusion-lit configs --copy NAME")
        return
    source, inside = find_config(copy), folder.resolve()
    own = source.relative_to(inside) if source.is_relative_to(inside) else Path(source.name)
    target = Path(out) / own  # in its folder: paper/edm_cifar10 is no edm_cifar10
    wanted = {target: source}
    wanted |= {target.parent / name: source.parent / name for name in _named_files(source)}
    for path, original in wanted.items():
        if path.exists() and (path == target or path.read_bytes() != original.read_bytes()):
            raise ValueError(f"{path} exists; move it away, or choose another folder by --out FOLDER.")
    for path, original in wanted.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(original, path)
    print("\n".join(f"Wrote {path}" for path in wanted))
    given = [str(target) if name == f"configs/{own.as_posix()}" else name for name in _configs_given(source, own)]
    if given:
        print(f"Train it: diffusion-lit fit {' '.join(f'--config {name}' for name in given)}")


def _configs_given(path: Path, own: Path) -> list[str]:
    """The configurations of the training at its head that names it: a paper's has another before. None: no training."""
    for line in path.read_text(encoding="utf-8").splitlines():
        names = re.findall(r"--config (\S+)", line) if re.match("#.* diffusion-lit fit ", line) else []
        if f"configs/{own.as_posix()}" in names:
            return names
    return []


def _first_line(path: Path) -> str:
    return path.read_text(encoding="utf-8").split("\n", 1)[0].removeprefix("#").strip()


def _named_files(path: Path) -> list[str]:
    """The files that a configuration names, as it names them: relative to its own folder."""
    values, named = [yaml.safe_load(path.read_text(encoding="utf-8"))], []
    while values:
        value = values.pop()
        if isinstance(value, dict):
            values += value.values()
        elif isinstance(value, list):
            values += value
        elif isinstance(value, str) and value.endswith(".yaml") and (path.parent / value).is_file():
            named.append(value)
    return sorted(set(named))
