"""What an error says: the innermost words of jsonargparse's own nests, in one sentence with one status."""

import io
import sys
import warnings
from typing import Any, Literal

import pytest
from jsonargparse import ArgumentParser

from diffusion_lit.runtime.sentences import plain, say_warnings_plainly, sentence
from diffusion_lit.runtime.stopping import RunStopped, end, told


class Net:
    """A network that refuses some sizes."""

    def __init__(self, size: int = 8, mult: tuple[int, ...] = (1, 2)) -> None:
        if size % 8:
            raise ValueError(f"size is {size}; it must be a multiple of 8: take 16.")


class Model:
    """A model with arguments of several types."""

    def __init__(
        self,
        net: Net | None = None,
        steps: int | float | None = None,
        kinds: list[int] | None = None,
        precision: Literal[16, 32] | Literal["bf16", "32"] | None = None,
        names: dict[str, int] | str | None = None,
    ) -> None:
        pass


def said(*args: str) -> str:
    class Parser(ArgumentParser):
        def error(self, message: str, ex: Any = None) -> None:
            raise ValueError(message)

    parser = Parser()
    parser.add_argument("--model", type=Model)
    path = f"{__name__}.Model"
    with pytest.raises(Exception) as caught:  # whatever jsonargparse raises
        parser.instantiate(parser.parse_args([f"--model={path}", f"--model.net={__name__}.Net", *args]))
    return sentence(caught.value)


@pytest.mark.parametrize(
    ("arg", "expected"),
    [
        ("--model.net.size=9", "size is 9; it must be a multiple of 8: take 16."),
        ("--model.net.size=x", "size is x; give a whole number."),
        ("--model.net=Nope", "net is Nope; give a class's full name, such as datamodules.Digits."),
        ("--model.net.class_path=collections.Nope", "net: module 'collections' has no attribute 'Nope'"),
        ("--model.steps=x", "steps is x; give a whole number or a number or null."),
        ("--model.kinds=[1, 2.5]", "kinds is 2.5; give a whole number."),
        ("--model.precision=17", "precision is 17; give one of 16, 32 or one of 'bf16', '32' or null."),
    ],
)
def test_a_nest_becomes_the_one_sentence_inside_it(arg, expected):
    assert said(arg) == expected


def test_what_is_long_keeps_its_beginning_and_its_end():
    text = plain("value is " + "x" * 1000 + "; give a number.")
    assert len(text) == 400 and text.startswith("value is x") and text.endswith("; give a number.")
    assert plain("f(x) argument after ** must be a mapping, not int") == "init_args must be a mapping, not int"
    assert len(said("--model.steps=" + "y" * 1000)) < 200


class MisconfigurationException(Exception):
    """Lightning's, by its name."""


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (KeyError("momentum"), "KeyError: 'momentum'. DIFFUSION_LIT_DEBUG=1 shows where."),
        (TypeError("got\n an int"), "TypeError: got an int. DIFFUSION_LIT_DEBUG=1 shows where."),
        (ZeroDivisionError("by zero"), "ZeroDivisionError: by zero. DIFFUSION_LIT_DEBUG=1 shows where."),
        (NotImplementedError(), "NotImplementedError. DIFFUSION_LIT_DEBUG=1 shows where."),
        (ModuleNotFoundError("No x"), "ModuleNotFoundError: No x. DIFFUSION_LIT_DEBUG=1 shows where."),
        (MisconfigurationException("No supported gpu backend found!"), "No supported gpu backend found!"),
        (ValueError("x is 3; give 4."), "x is 3; give 4."),
    ],
)  # fmt: skip
def test_every_error_of_a_command_ends_it_with_a_sentence_and_status_2(error, expected, capsys, monkeypatch):
    with pytest.raises(SystemExit, match="2"):
        end(error, "study")
    assert capsys.readouterr().err == f"study: {expected}\n"
    monkeypatch.setenv("DIFFUSION_LIT_DEBUG", "1")
    with pytest.raises(type(error)):
        end(error)


def test_a_bug_amid_training_keeps_its_traceback_and_memory_is_explained():
    bug = KeyError("x")
    assert told(bug, started=True) is None and told(bug) is None
    assert "fault of the program" in bug.__notes__[0]
    assert told(ValueError("x is 3."), started=True).status == 2
    assert told(RunStopped("Stopped.", 130)).status == 130
    assert told(MemoryError(), batch_size=7, fits=True).status == 2
    late = told(MemoryError(), started=True, batch_size=7, fits=True)
    assert late.status == 1 and "batch_size 7" in str(late) and len(str(late)) <= 400


def test_a_warning_is_a_sentence_without_the_code_behind_it(monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", before := warnings.formatwarning)
    monkeypatch.setenv("DIFFUSION_LIT_DEBUG", "1")
    say_warnings_plainly()
    assert warnings.formatwarning is before
    monkeypatch.delenv("DIFFUSION_LIT_DEBUG")
    say_warnings_plainly()
    said = warnings.formatwarning(UserWarning("x is 3;\n  give 4."), UserWarning, "code.py", 7, "warn(told)")
    assert said == "warning: x is 3; give 4.\n"


def test_a_pipe_that_is_closed_ends_in_silence(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    with pytest.raises(SystemExit, match="141"):
        end(BrokenPipeError())
    assert not capsys.readouterr().err
