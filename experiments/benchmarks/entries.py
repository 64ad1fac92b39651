"""Entries of the speedrun.

An entry is a YAML. Most are trained by `diffusion-lit fit`: the file is one of its configs, or names one and changes:

    config: configs/edm_fashion_mnist.yaml
    options: {model.init_args.sampling.num_steps: 10}
    code: my_net.py                     # if need be: a module beside the file, whose classes the config names

or it names another library, whose own network, training step and sampler take part (`contenders`):

    contender: smalldiffusion
    width: 32                           # channels of the first level of its network
    batch_size: 32

With `code` beside `contender` that file's `peer(job)` is taken instead of a known one.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from diffusion_lit.checks import check_count
from diffusion_lit.commands.configs import find_config
from diffusion_lit.storage.hashing import key_of
from experiments.benchmarks.contenders import OURS, installed
from experiments.benchmarks.tracks import SPEEDRUNS
from experiments.harness.configs import read_config

KEYS = ("config", "options", "code", "contender", "width", "batch_size")
DECIDED = ("ckpt_path", "init_from", "trust", "config", "name")  # options that an entry must not set


@dataclass(frozen=True)
class Entry:
    """An entry of the speedrun.

    Args:
        name: Its name in tables.
        config: Settings of `diffusion-lit fit`, nested, as config.yaml of a run has them; None for another library.
        options: What differs from them, by the names of its command line.
        contender: Name of another library; "" with `config`.
        width: Channels of the first level of that library's network.
        batch_size: Images per step of that library.
        code: Text of its Python file.
        module: Name of that file's module.
    """

    name: str
    config: dict[str, Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    contender: str = ""
    width: int = 32
    batch_size: int = 32
    code: str | None = None
    module: str = ""

    @property
    def key(self) -> str:
        """The hash of all its contents."""
        return key_of({name: value for name, value in vars(self).items() if name != "name"})


def read_entry(name: str, track: str) -> Entry:
    """Reads an entry.

    Args:
        name: A YAML, or the name of one in `speedruns/TRACK/` or `speedruns/`.
        track: Name of the track.

    Raises:
        ValueError: If there is none, or it is neither a config nor names one or a library that is installed.
    """
    places = [SPEEDRUNS / track / f"{name}.yaml", SPEEDRUNS / f"{name}.yaml", Path(name)]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        known = sorted({place.stem for folder in (track, ".") for place in (SPEEDRUNS / folder).glob("*.yaml")})
        raise ValueError(f"There is no entry {name}; give a YAML, or one of {', '.join(known)}.")
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no entry, since it is no YAML: {' '.join(str(error).split())}") from error
    if isinstance(content, dict) and "model" in content:
        return check_entry(Entry(path.stem, read_config(path)), path)
    if not isinstance(content, dict) or not ("config" in content) ^ ("contender" in content):
        raise ValueError(
            f"{path} is no entry: it is a config of diffusion-lit fit, or has a line config: or contender:."
        )
    for key in content:
        if key not in KEYS:
            raise ValueError(f"{path} says {key}, but an entry has {', '.join(KEYS)}.")
    code = None if content.get("code") is None else path.parent / content["code"]
    if code is not None and not code.is_file():
        raise ValueError(f"{path} names the code {code}, which is not there.")
    told: dict[str, Any] = {} if code is None else {"code": code.read_text(), "module": code.stem}
    if "config" in content:
        config = path.parent / content["config"]
        config = config if config.is_file() else find_config(content["config"])
        return check_entry(Entry(path.stem, read_config(config), content.get("options") or {}, **told), path)
    contender = str(content["contender"])
    if code is None and (contender not in installed() or contender == OURS):
        raise ValueError(f"{contender} is no library that is known and installed here; pip install it, or give code.")
    sizes: dict[str, Any] = {key: content[key] for key in ("width", "batch_size") if key in content}
    return check_entry(Entry(path.stem, None, {}, contender, **sizes, **told), path)


def check_entry(entry: Entry, path: Path) -> Entry:
    """Checks that an entry trains from scratch.

    Args:
        entry: The entry.
        path: Where it stands.

    Raises:
        ValueError: If it starts from a checkpoint, its model names a file of another training, such as an autoencoder,
            a teacher or a guide, or a size is missing or no count.
    """
    check_count(width=entry.width, batch_size=entry.batch_size)
    if entry.config is None:
        return entry
    config, options = entry.config, entry.options
    if not isinstance(options, dict):
        raise ValueError(f"{path} has the options {options}; give names and values, such as trainer.max_steps: 100.")
    for name in (*config, *options):
        if name in DECIDED and (config.get(name) or options.get(name)):
            raise ValueError(
                f"{path} sets {name}, but an entry trains from scratch and lets the track decide the rest."
            )
    model = {name: value for name, value in options.items() if name.startswith("model")}
    for name in _files([config.get("model"), model]):
        raise ValueError(f"{path} names {name} in its model, but an entry trains from scratch; leave it out.")
    data = config.get("data")
    arguments = data.get("init_args") if isinstance(data, dict) else None
    if "batch_size" not in (arguments or {}):
        raise ValueError(f"{path} has no data.init_args.batch_size, which the track leaves to the entry.")
    return entry


def _files(value: Any) -> Iterator[str]:
    """The values in nested settings that are files or folders here."""
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _files(part)
    elif isinstance(value, str) and value and len(value) < 200 and Path(value).exists():
        yield value
