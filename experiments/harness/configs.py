"""Configs of `diffusion-lit fit` as nested settings: read with the files that they name, and merged with options."""

from pathlib import Path
from typing import Any

import yaml


def read_config(path: Path) -> dict[str, Any]:
    """The settings of a config, with the files that it names read in.

    Args:
        path: The YAML.
    """

    def filled(value: Any) -> Any:
        if isinstance(value, str) and value.endswith(".yaml") and (path.parent / value).is_file():
            return read_config(path.parent / value)
        if isinstance(value, dict):
            return {key: filled(part) for key, part in value.items()}
        return [filled(part) for part in value] if isinstance(value, list) else value

    found: dict[str, Any] = filled(yaml.safe_load(path.read_text()))
    return found


def merge(config: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """A config with options set in it.

    Args:
        config: Nested settings, left as they are.
        options: Values by their path, its parts joined by dots, as on the command line.
    """
    made: dict[str, Any] = yaml.safe_load(yaml.safe_dump(config))
    for name, value in options.items():
        *path, last = name.split(".")
        part = made
        for key in path:
            if not isinstance(part.get(key), dict):
                part[key] = {} if part.get(key) is None else {"class_path": part[key]}
            part = part[key]
        part[last] = yaml.safe_load(value) if isinstance(value, str) else value
    return made
