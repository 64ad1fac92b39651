"""Private names of Lightning and jsonargparse stand in one file, exist, and mean what it says."""

import ast
import contextlib
import importlib
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.demos.boring_classes import BoringModel
from packaging.requirements import Requirement

from diffusion_lit.runtime import internals

ROOT = Path(__file__).resolve().parents[2]
FILES = [
    path
    for room in ("diffusion_lit", "datamodules")
    for path in sorted((ROOT / room).rglob("*.py"))
    if path.name != "internals.py"
]
TREES = {path: ast.parse(path.read_text()) for path in FILES}
FOREIGN = {  # private by their names alone, or of libraries whose versions pyproject.toml leaves open
    *{"_current_frames", "_exit", "_replace", "_actions", "_instances", "_get_file_writer", "_text_preprocessing"},
    *{"_amp_foreach_non_finite_check_and_unscale_", "_foreach_copy_", "_foreach_lerp_", "_step_supports_amp_scaling"},
    *{"_is_amx_tile_supported", "_is_avx512_bf16_supported", "_get_default_store", "_step_count", "_last_lr"},
    "_get_fs_provider",
}


def private(name):
    return name.startswith("_") and not name.startswith("__")


def own_names():
    """Private names that the tree itself defines: functions, classes, attributes and variables."""
    names = set()
    for tree in TREES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
                names.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                    names.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
    return names


def used(tree):
    """Private attributes that a file reads or writes, by a dot or by a text, and private names that it imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and private(node.attr):
            yield node.attr
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr", "setattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and private(name.value):
                yield name.value
        elif isinstance(node, ast.ImportFrom):
            yield from (alias.name for alias in node.names if private(alias.name))


def test_private_names_of_libraries_stand_in_one_file():
    protected = {name for names in internals.PROTECTED.values() for name in names}
    allowed = own_names() | protected | FOREIGN
    found = {(path.name, name) for path, tree in TREES.items() for name in used(tree) if name not in allowed}
    assert not found, found


def test_the_versions_are_those_that_were_checked():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = {one.name: one for one in map(Requirement, project["dependencies"])}
    for name, range_ in internals.CHECKED.items():
        assert required[name].specifier == Requirement(f"{name}{range_}").specifier
        assert any(one.operator == "<" for one in required[name].specifier)
        assert required[name].specifier.contains(version(name))


@pytest.mark.parametrize("place", internals.PROTECTED)
def test_what_subclasses_override_is_there(place):
    """Methods are on the class; attributes are set in its `__init__`."""
    module, _, name = place.rpartition(".")
    kind = getattr(importlib.import_module(module), name)
    trainer = Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False)
    made = {
        "ModelCheckpoint": lambda: ModelCheckpoint(),
        "WeightAveraging": lambda: WeightAveraging(),
        "LightningCLI": lambda: kind,
        "TrainingEpochLoop": lambda: trainer.fit_loop.epoch_loop,
        "EvaluationLoop": lambda: trainer.fit_loop.epoch_loop.val_loop,
    }[name]()
    assert [attribute for attribute in internals.PROTECTED[place] if not hasattr(made, attribute)] == []


class Watched(BoringModel):
    """Asks at each batch what Lightning does next."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_train_batch_end(self, outputs, batch, batch_idx):
        trainer = self.trainer
        asked = (internals.accumulates, internals.validates_next, internals.ends_epoch, internals.stops_early)
        self.seen.append(tuple(bool(ask(trainer)) for ask in asked))
        with internals.as_in_validation(trainer):
            assert trainer.validating
        assert trainer.training

    def training_step(self, batch, batch_idx):
        self.log("figure", 1.0)
        self.logged = [*getattr(self, "logged", []), internals.logs_now(self.trainer)]
        return super().training_step(batch, batch_idx)


def test_what_is_asked_of_the_trainer_is_so(tmp_path):
    module = Watched()
    assert internals.trainer_of(module) is None
    trainer = Trainer(
        **{"max_epochs": 1, "limit_train_batches": 5, "limit_val_batches": 1, "accumulate_grad_batches": 2},
        **{"val_check_interval": 4, "log_every_n_steps": 2, "accelerator": "cpu", "num_sanity_val_steps": 0},
        **{"logger": False, "enable_checkpointing": False, "enable_progress_bar": False},
        **{"enable_model_summary": False, "default_root_dir": tmp_path},
    )
    trainer.fit(module)
    assert internals.trainer_of(module) is trainer
    columns = list(zip(*module.seen, strict=True))
    assert columns[0] == (True, False, True, False, False)  # the last batch steps alone
    assert columns[1] == (False, False, False, True, False)
    assert columns[2] == (False, False, False, False, True)
    assert not any(columns[3])
    assert module.logged == [False, False, True, True, False]  # steps of two batches, every second one
    (optimizer,) = trainer.optimizers
    assert internals.bare(optimizer) is optimizer
    assert type(internals.bare(module.optimizers())) is torch.optim.SGD
    assert internals.cluster_of(trainer) is not None
    assert internals.requeue_of(trainer).__self__.trainer is trainer
    connector = internals.requeue_of(trainer).__self__
    connector.received_sigterm = True
    assert trainer.received_sigterm
    assert internals.take_sigterm(trainer)
    assert not trainer.received_sigterm
    assert internals.average_of(WeightAveraging()) is None


def test_jsonargparse_is_changed_within_a_command_alone():
    from jsonargparse import ArgumentParser, _typehints, _util

    import diffusion_lit.commands.fit  # noqa: F401 (changes nothing by being imported)

    before = _typehints.discard_init_args_on_class_path_change
    assert before.__module__ == "jsonargparse._typehints"
    asked, changed = [], []

    def refuse(path):
        asked.append(path)
        raise ImportError(path)

    def note(discard):
        return lambda parser, old, new: (
            changed.append((old["class_path"], new["class_path"])) or discard(parser, old, new)
        )

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--part", type=torch.optim.lr_scheduler.LRScheduler | WeightAveraging | ModelCheckpoint)
    given = ["--part=lightning.pytorch.callbacks.ModelCheckpoint", "--part=lightning.pytorch.callbacks.WeightAveraging"]
    with internals.class_change(note):
        parser.parse_args(given)
    assert any(old.endswith("ModelCheckpoint") and new.endswith("WeightAveraging") for old, new in changed)
    with internals.import_check(refuse), contextlib.suppress(Exception):
        parser.parse_args(given[:1])
    assert asked
    assert _typehints.discard_init_args_on_class_path_change is before
    assert _util.check_import_path is _typehints.check_import_path is not refuse
