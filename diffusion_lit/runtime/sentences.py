"""What an error says, in one sentence: the one that helps, out of all that the libraries put around it.

jsonargparse words a value that fits none of several types as a page of what each of them said, and packs the sentence
of a class that refuses its arguments into such a page. `sentence` takes the innermost words out of it.
"""

import logging
import os
import re
import warnings
from pathlib import Path

import yaml

from diffusion_lit.words import article

LONGEST = 400  # characters
DEBUG = "DIFFUSION_LIT_DEBUG"
OF_THE_USER = (ValueError, OSError)  # their words are for the user; of other errors the kind is named too

_NEST = ("Does not validate against any of the Union subtypes", "Errors:", "Subtypes:", "Subclass types expect one of")
_CHOICES = ("Expected a path but ", "a class path (str)", "a dict with ", "a dict without ")
_AROUND = re.compile(r"Problem with given class_path .*:$|Parser key \"[^\"]*\":$")
_EXPECTED = re.compile(
    r"(?:Expected an? (<class .*?|typing\..*?)|Not a valid subclass of (\w+))(?:\. Got value:(.*))?$"
)
_OF_ITS_CODE = re.compile(  # errors of jsonargparse's own code
    "'.*' object has no attribute '|unhashable type|argument of type"
)
_NO_MAPPING = re.compile("Unable to load config '(.*)'")
_NO_PATH = re.compile(
    r"Expected (?:a dot import path string: |an import path or a subclass spec, but got )(.*?)(?:\. Got value.*)?$"
)


def debugging() -> bool:
    """Whether errors keep their tracebacks: the environment variable DIFFUSION_LIT_DEBUG is set."""
    return bool(os.environ.get(DEBUG))


def sentence(error: BaseException) -> str:
    """What an error says.

    Returns:
        At most 400 characters on one line. What was not written for a user begins with the error's kind and ends with
        how to see where it was raised.
    """
    if str(error).startswith("Call to compute_fn of link") and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, RecursionError):
        return (
            f"Something is nested too deeply: look for long rows of brackets in what was given. {DEBUG}=1 shows where."
        )
    said = plain(str(error))
    kind = type(error).__name__
    told = isinstance(error, OF_THE_USER) or kind == "MisconfigurationException" or said.startswith("init_args must be")
    if said and told:
        return said
    return f"{plain(f'{kind}: {said}'.removesuffix(': '), LONGEST - 50).rstrip('.')}. {DEBUG}=1 shows where."


def say_warnings_plainly() -> None:
    """Prints warnings as sentences, without the file and the line of code that they come from."""
    if not debugging():
        warnings.formatwarning = lambda message, *_, **__: f"warning: {plain(str(message), 600)}\n"


def quiet_lightning() -> None:
    """Leaves out what Lightning says to advertise or to warn of what this project does on purpose."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "litlogger" not in record.getMessage() and "litmodels" not in record.getMessage()
    )
    for message in (
        ".*is an instance of `nn.Module` and is already saved.*",
        ".*`isinstance\\(treespec, LeafSpec\\)`.*",
        ".*does not have many workers.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*Precision .* is not supported by the model summary.*",
        ".*Experiment logs directory .* exists and is not empty.*",
        ".*Total length of `list` across ranks is zero.*",
        ".*loading a checkpoint outside the 'fit' stage.*",
        ".*The dirpath has changed from.*",  # our record of the best goes along
    ):
        warnings.filterwarnings("ignore", message=message)


def too_deep(words: list[str]) -> ValueError | None:
    """What to say of the option or file whose value is nested deeper than YAML is read, if there is one.

    Returns:
        The error that names it.
    """
    for before, word in zip(["", *words], words, strict=False):
        option, _, value = word.partition("=") if word.startswith("--") else (before, "=", word)
        path = Path(value)
        try:
            yaml.safe_load(path.read_text() if len(value) < 4096 and path.is_file() else value)
        except RecursionError:
            return ValueError(
                f"{option} {plain(value, 60)} is nested too deeply to be read: it opens too many brackets."
            )
        except (yaml.YAMLError, ValueError):
            continue
    return None


def plain(text: str, longest: int = LONGEST) -> str:
    """The words that help, out of a text of jsonargparse's or any other.

    Args:
        text: What an error says, perhaps on many lines.
        longest: Most characters; what is longer loses its middle.
    """
    keys = re.findall(r'(?m)^\s*(?:- )?Parser key "([^"]*)":', text)
    if keys or _NEST[0] in text:
        text = _innermost(text, keys[-1] if keys else "")
    text = re.sub(r"\S.*? argument after \*\* must be", "init_args must be", " ".join(text.split()))
    ends = longest * 5 // 8
    return text if len(text) <= longest else f"{text[:ends]} ... {text[ends + 5 - longest :]}"


def _innermost(text: str, key: str) -> str:
    """The sentence inside a nest, with the key that it is about."""
    given = re.findall(r"(?m)^\s*Given value: (.*)$", text)
    tensors = "<class 'torch.Tensor'>" in text  # which nobody names by its class: the other types are meant
    text = re.sub(r"(?m)^\s*(?:Given value(?: type)?|Subtypes):.*$", "", text)
    text = re.sub(r"Type typing\.Callable\[.*\] expects a function or a callable class: ", "", text)
    lines = [line.strip().removeprefix("- ") for line in text.splitlines()]
    around = (*_NEST, *_CHOICES, "Import path") if tensors else (*_NEST, *_CHOICES)
    lines = [line for line in lines if line and not line.startswith(around) and not _AROUND.match(line)]
    about = f"{key}: " if key else ""
    paths = [match[1] for line in lines if (match := _NO_PATH.match(line))]
    if paths and not tensors:
        return f"{key or 'A class'} is {paths[0]}; give a class's full name, such as datamodules.Digits."
    if any(_OF_ITS_CODE.match(line) for line in lines):
        return f"{key or 'A value'} is neither a class_path with its init_args nor a mapping of options."
    if given and any(line.startswith("Expected an instantiatable class, but") for line in lines):
        return f"{key or 'A class'} is {given[-1]}, the base of others; give one of these by its full name."
    if key and (loaded := next((match for line in lines if (match := _NO_MAPPING.match(line))), None)):
        return f"{key} is {loaded[1]}; give a mapping of its options."
    if helpful := [line for line in lines if not line.startswith(("Expected a", "Not a valid subclass"))]:
        return about + helpful[0]
    asked = [match for line in lines if (match := _EXPECTED.match(line))]
    asked = [match for match in asked if match[3] is not None] or asked  # what names its value is the innermost
    types = dict.fromkeys(
        type_in_words(match[1]) if match[1] else f"{article(match[2])} by class_path" for match in asked
    )
    value = next((match[3] for match in asked if match[3] is not None), given[0] if given else None)
    if not types or value is None:
        return about + (lines[0] if lines else "This value is not valid.")
    value = {"": "empty", "None": "null"}.get(value.strip(), value.strip())
    value = value if len(value) <= 80 else f"{value[:60]} ... {value[-15:]}"
    # Python may hand out `float | int` for `int | float`, whichever it made first.
    named = sorted(types, key=lambda one: {"a whole number": -1, "a number": 1, "null": 2}.get(one, 0))
    return f"{key or 'A value'} is {value}; give {' or '.join(named)}."


def type_in_words(name: str) -> str:
    """A type in a user's words.

    Args:
        name: As Python shows it, such as `<class 'int'>`.

    Returns:
        Such as "a whole number"; of other classes the name alone.
    """
    known = {"int": "a whole number", "float": "a number", "str": "a word", "bool": "true or false", "NoneType": "null"}
    inner = re.sub(r"^<class '(?:.*\.)?(\w+)'>$", r"\1", name)
    listed = {"tuple": "a list", "list": "a list", "dict": "a mapping"}
    return known.get(inner) or listed.get(inner) or re.sub(r"^typing\.Literal\[(.*)\]$", r"one of \1", inner)
