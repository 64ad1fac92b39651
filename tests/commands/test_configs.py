"""Every config, through the real command in this process, offline, on tiny data in each set's official layout."""

import importlib
import inspect

import pytest
import yaml
from helpers.configs_tools import CONFIGS, DATA, EXPERIMENTS, parts

DIFFUSION = tuple(f"diffusion_lit.modules.{name}" for name in ("DDPM", "EDM", "Consistency", "MeanFlow"))


@pytest.mark.parametrize("config", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_config_says_what_it_is_and_repeats_no_base(config):
    text = "\n".join(line for line in config.read_text().splitlines() if line.startswith("#"))
    assert f"diffusion-lit fit --config configs/{config.name}" in text
    for word in ("Cost:", "Expect:"):
        assert word in text
    base, own = (yaml.safe_load(path.read_text()) for path in (CONFIGS / "base.yaml", config))
    assert not [key for key, value in own.get("trainer", {}).items() if base["trainer"].get(key) == value]


@pytest.mark.parametrize(
    "config", [path for path in EXPERIMENTS if parts(path)[1] in DIFFUSION], ids=lambda path: path.stem
)
def test_every_diffusion_config_runs(config, lightning, tmp_path):
    _, _, data = parts(config)
    lightning(
        *["fit", "--config", config, "--trainer.fast_dev_run=2", "--trainer.accelerator=cpu", "--trainer.callbacks=[]"],
        *["--model.init_args.net.init_args.model_channels=16", "--model.init_args.sampling.num_steps=2"],
        *["--data.init_args.batch_size=4", "--sample_grid.columns=1", "--trajectory.count=1"],
        *["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"],
        *DATA[data](tmp_path / "images"),
    )
    assert not (tmp_path / "runs").exists()


CORE = "diffusion_lit.diffusion"
COMBINATIONS = {
    "cosine, v, min-SNR, uniform t": ["ddpm", "prediction=v", "schedule=CosineSchedule", "loss.weight=MinSNR"],
    "sigmoid, x0, unit weight, logit-normal": [
        *["ddpm", "prediction=x0", "schedule=SigmoidSchedule", "loss.weight=UnitWeight", "noise_levels=LogitNormal"],
    ],
    "continuous VP, eps, learned uncertainty": ["ddpm", "schedule=ContinuousVP", "loss.weight=LearnedUncertainty"],
    "flow, logit-normal": ["edm", "scaling=FlowPreconditioning", "noise_levels=LogitNormal"],
    "flow path, x0, uniform t": ["edm", "scaling=X0Preconditioning", "noise_levels=UniformT"],
    "learned variance": ["ddpm", "loss=HybridLoss", "net.init_args.out_channels=2"],
}


@pytest.mark.parametrize("choices", COMBINATIONS.values(), ids=COMBINATIONS)
def test_schedules_predictions_weights_and_noise_levels_combine_freely(choices, lightning):
    family, *choices = choices
    options = []
    for choice in choices:
        name, value = choice.split("=")
        if name == "loss.weight":
            options += [f"--model.init_args.loss={CORE}.DenoisingLoss", f"--model.init_args.loss.weight={CORE}.{value}"]
        else:
            options.append(
                f"--model.init_args.{name}={CORE}.{value}" if value[0].isupper() else f"--model.init_args.{choice}"
            )
    if "loss=HybridLoss" in choices:
        options.append('--model.init_args.sampling.sampler_options={"variance": "learned"}')
    lightning(
        *["fit", "--config", CONFIGS / f"{family}_digits.yaml", "--trainer.fast_dev_run=1", "--trainer.callbacks=[]"],
        *["--trainer.accelerator=cpu", "--model.init_args.net.init_args.model_channels=16", "--sample_grid.columns=1"],
        *["--model.init_args.sampling.num_steps=2", "--trainer.enable_progress_bar=false"],
        *options,
    )


def printed(lightning, capsys, *args):
    """The configuration that a command would run with."""
    with pytest.raises(SystemExit):
        lightning("fit", *args, "--print_config")
    return yaml.safe_load(capsys.readouterr().out)


def own_default(class_path, name):
    module, _, cls = class_path.rpartition(".")
    known = [
        inspect.signature(base.__init__).parameters for base in getattr(importlib.import_module(module), cls).__mro__
    ]
    return next(parameters[name].default for parameters in known if name in parameters)


@pytest.mark.parametrize("name", ["edm_cifar10", "ddpm_cifar10"])
def test_the_papers_parts_are_not_mixed_with_those_of_the_config_before(name, lightning, capsys):
    paper = CONFIGS / "paper" / f"{name}.yaml"
    model = printed(lightning, capsys, f"--config={CONFIGS}/{name}.yaml", f"--config={paper}")["model"]["init_args"]
    given = yaml.safe_load(paper.read_text())["model"]["init_args"]
    for part in ("net", "optimizer", "lr_scheduler"):
        assert model[part]["class_path"] == given[part]["class_path"]
        for key, value in model[part]["init_args"].items():
            default = own_default(given[part]["class_path"], key)
            wanted = given[part]["init_args"].get(key, list(default) if isinstance(default, tuple) else default)
            assert value == wanted, (part, key)


def test_another_optimizer_has_its_own_defaults_and_other_data_the_same_batches(lightning, capsys):
    config = f"--config={CONFIGS}/edm_digits.yaml"
    whole = printed(lightning, capsys, config, "--model.init_args.optimizer.class_path=torch.optim.Adam")
    assert whole["model"]["init_args"]["optimizer"]["init_args"]["weight_decay"] == 0
    whole = printed(lightning, capsys, config, "--model.init_args.optimizer=Adam")
    assert whole["model"]["init_args"]["optimizer"]["init_args"]["weight_decay"] == 0
    other = printed(lightning, capsys, config, "--data.class_path=datamodules.MNIST", "--data.init_args.root=x")
    assert other["data"]["init_args"]["batch_size"] == whole["data"]["init_args"]["batch_size"] == 64
    assert other["data"]["init_args"]["root"] == "x"
