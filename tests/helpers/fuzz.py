"""Command lines and configurations with mistakes, drawn from a seed, and a process that tries them one after another.

`run` reads cases, a JSON list of command lines, and writes a line for each: its status, what it said on standard error,
and the most memory that the process has had, in GB.
"""

import contextlib
import copy
import io
import json
import random
import re
import resource
import signal
from pathlib import Path

import yaml

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
POPEN = {"class_path": "subprocess.Popen", "init_args": {"args": "touch PWNED", "shell": True}}
SYSTEM = {"class_path": "os.system", "init_args": {"command": "touch PWNED"}}
VALUES = [
    *(None, True, -1, 0, 1, 3, 7, 0.5, -0.5, 1e-9, 1e30, 10**9, float("nan"), float("inf")),
    *("", "x", "é", "../x", "/", "0.5", "a" * 300, "null.null", "os.system", "torch.nn.Linear"),
    *("diffusion_lit.modules.EDM", [], {}, [1], [0, -1], ["a", "b"], [[1, 2], [3]], {"a": 1}),
    *({"class_path": "datamodules.Digits"}, {"init_args": {"x": 1}}, POPEN, SYSTEM),
    {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"monitor": "val_loss"}},
]
SMALL = [
    *["--trainer.fast_dev_run=1", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"],
    *["--trainer.enable_model_summary=false", "--name=run"],
]
SLOW = ("num_nodes", "devices", "strategy", "fast_dev_run")  # these wait for other processes, or train at length
FAMILIES = (
    "edm_digits",
    "ddpm_digits",
    "vae_digits",
    "cold_digits",
    "consistency_digits",
    "meanflow_digits",
    "superres_fashion_mnist",
)
COMMANDS = ("sample", "evaluate", "export", "report", "edit denoise", "edit invert", "edit inpaint", "configs")


def places(node, path=()):
    """The way to each value of a nested configuration."""
    for key, value in node.items() if isinstance(node, dict) else ():
        yield (*path, key)
        yield from places(value, (*path, key))


def mutated(config, draw):
    """A configuration with one or two mistakes: a value, a name, a part that is missing or one too many."""
    config = copy.deepcopy(config)
    for _ in range(draw.choice((1, 1, 2))):
        path = draw.choice([path for path in places(config) if path[-1] not in SLOW])
        node = config
        for key in path[:-1]:
            node = node[key]
        act = draw.random()
        if act < 0.7:
            node[path[-1]] = draw.choice(VALUES)
        elif act < 0.8:
            node.pop(path[-1])
        elif act < 0.9:
            node[f"{path[-1]}x"] = node.pop(path[-1])
        else:
            node["class_path"] = draw.choice(VALUES)
    return config


def base(family):
    """A family's configuration with what base.yaml says, so that everything may be mistaken."""
    config = yaml.safe_load((CONFIGS / "base.yaml").read_text())
    named = yaml.safe_load((CONFIGS / f"{family}.yaml").read_text())
    trainer = {**config["trainer"], **named["trainer"], "callbacks": []}
    if "digits" not in family:  # whose data would have to be there
        named["data"] = {"class_path": "datamodules.Digits", "init_args": {"use_labels": False}}
    named["data"].setdefault("init_args", {})["batch_size"] = 8
    return {**config, **named, "trainer": trainer}


def config_cases(seed, count, folder):
    """Command lines with a sound configuration and `count` mutated ones, which are written to a folder."""
    draw = random.Random(seed)
    for index in range(count + 1):
        config = base(draw.choice(FAMILIES))
        text = yaml.safe_dump(mutated(config, draw) if index else config, allow_unicode=True)
        if index and draw.random() < 0.1:
            at = draw.randrange(len(text))
            text = text[:at] + draw.choice(["", "\t", ":", "[", "é", "\0", "- ", '"']) + text[at + draw.randrange(3) :]
        file = folder / f"case{index}.yaml"
        file.write_text(text, encoding="utf-8")
        yield ["fit", f"--config={file}", *SMALL]


def line_cases(seed, count, folder, ckpt_path):
    """A sound command line and `count` with mistakes: of `fit`, and of the commands that take a checkpoint."""
    draw = random.Random(seed)
    options = {command: options_of(command) for command in COMMANDS}
    for family in FAMILIES:
        (folder / f"{family}.yaml").write_text(yaml.safe_dump(base(family)))
    yield ["fit", f"--config={folder}/edm_digits.yaml", *SMALL]
    for _ in range(count):
        command, family = draw.choice(("fit", "fit", *COMMANDS)), draw.choice(FAMILIES)
        names = options.get(command) or [".".join(path) for path in places(base(family)) if path[-1] not in SLOW]
        mistakes = [f"--{draw.choice(names)}={_spell(draw.choice(VALUES))}" for _ in range(draw.choice((1, 1, 2)))]
        if command == "fit":
            yield ["fit", f"--config={folder / family}.yaml", *SMALL, *mistakes]
            continue
        small = {
            "ckpt_path": str(ckpt_path),
            "device": "cpu",
            "num_samples": 8,
            "count": 2,
            "num_steps": 2,
            "out": {"evaluate": "drawn.json", "report": "drawn.html"}.get(command, "drawn"),
        }
        yield [*command.split(), *[f"--{name}={small[name]}" for name in names if name in small], *mistakes]


def _spell(value):
    return value if isinstance(value, str) else json.dumps(value)


def options_of(command):
    """The names of a command's options."""
    from importlib import import_module

    from diffusion_lit.commands import main

    first, _, task = command.partition(" ")
    found = getattr(import_module(main.COMMANDS[first].module), main.COMMANDS[first].function)
    parser = main.function_parser(found[task] if task else found, command.split())
    known = [name for action in parser._actions for name in action.option_strings]
    return [name[2:] for name in known if name[:2] == "--" and name[2:] not in ("help", "print_config", *SLOW)]


def attempt(main, line, seconds=60):
    """Runs a command: its status (130 where it was still at work) and what it said."""
    out, err = io.StringIO(), io.StringIO()
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.alarm(seconds)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main(line)
        status = 0
    except SystemExit as stopped:
        status = stopped.code or 0
    except KeyboardInterrupt:
        status = 130
    except BaseException as error:
        status, line = f"Traceback of {type(error).__name__}: {error}", line
    finally:
        signal.alarm(0)
    return status, err.getvalue()


def told(said):
    """What a command told, without the warnings before it and its name."""
    found = re.search(r"^diffusion-lit: (.*)", said, re.MULTILINE | re.DOTALL)
    return found[1].strip() if found else ""


def run(cases, outcomes, memory=4 * 2**30):
    """Tries each case that has no outcome yet."""
    cases, outcomes = Path(cases), Path(outcomes)
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    from diffusion_lit.commands.main import main

    done = len(outcomes.read_text().splitlines()) if outcomes.is_file() else 0
    for line in json.loads(cases.read_text())[done:]:
        status, said = attempt(main, line)
        with outcomes.open("a") as file:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            file.write(json.dumps({"line": line, "status": status, "said": said[-3000:], "peak": peak}) + "\n")
