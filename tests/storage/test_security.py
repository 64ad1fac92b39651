"""Nothing in a file is executed, no flipped bit changes what is read, and no file chooses a place to write to.

Each reader of the project is given both attacks, a class that runs a command and a class of a module in the current
folder, and pickles; none may leave its marker, and the module may not be imported.
"""

import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_files import DATA, NET, RECORD, autoencoder, checkpoint, classifier, combined, latent, write

from datamodules import CIFAR10, MNIST, Digits, ImageFolder, Subset
from datamodules.pickles import read_pickle
from diffusion_lit.commands import main as cli
from diffusion_lit.commands.export import export
from diffusion_lit.evaluation.external import reference_from_file
from diffusion_lit.evaluation.features import Pixels
from diffusion_lit.modules.autoencoders import load_autoencoder
from diffusion_lit.modules.data_classifier import classifier_from_checkpoint
from diffusion_lit.modules.load import load_data, load_module
from diffusion_lit.modules.weights import read_state
from diffusion_lit.pretrained.files import load_part, refuse_code, refuse_foreign_parts
from diffusion_lit.pretrained.prompts import _read
from diffusion_lit.storage.checkpoints import read_checkpoint
from diffusion_lit.storage.tensors import read_record, read_tensors
from diffusion_lit.storage.trust import Untrusted, check, find_class, trusting

COMMAND = {"class_path": "subprocess.Popen", "init_args": {"args": "touch PWNED", "shell": True}}
APPLY = {"class_path": "torchvision.transforms.RandomApply", "init_args": {"transforms": COMMAND}}
OWN = {"class_path": "evilmod.X"}
LAMBDA = "torch.optim.lr_scheduler.LambdaLR"
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(11)
)
ATTACKS = {
    "a command under any value": {"sampling": {"sampler_options": {"x": COMMAND}}},
    "a class that calls what it is given": {"net": APPLY},
    "a module of the folder": {"net": OWN},
    "the same as a text": {"net": "evilmod.X"},
    "the same as JSON": {"net": json.dumps(OWN)},
    "the same as JSON in disguise": {"net": '{"class\\u005fpath": "evilmod.X"}'},
    "a file in a class's place": {"net": "evil.yaml"},
    "a URL whose protocol is a module of the folder": {"loss": "oss://a/b"},
    "a chain of protocols": {"noise_levels": "zip://x::oss://a"},
    "a file of the machine": {"loss": "/etc/passwd"},
    "aliases that stand for gigabytes": {"loss": BOMB},
    "deep down": {"net": {"class_path": "diffusion_lit.nets.UNet", "init_args": {**NET, "x": [{"y": (OWN,)}]}}},
    "further arguments": {
        "net": {"class_path": "diffusion_lit.nets.UNet", "init_args": NET, "dict_kwargs": {"x": OWN}}
    },
    "a module's attribute": {"net": {"class_path": "diffusion_lit.modules.latent_space.torch.nn.Sequential"}},
    "an attribute of ours": {"net": {"class_path": "diffusion_lit.modules.vae.math.floor"}},
    "a short name": {"net": "Sequential"},
    "another library's class": {"net": {"class_path": "torch.nn.Sequential"}},
    "no optimizer": {"net": {"class_path": "torch.optim.swa_utils.AveragedModel", "init_args": {"model": OWN}}},
    "the base of optimizers": {"optimizer": {"class_path": "torch.optim.Optimizer", "init_args": {"defaults": {}}}},
    "the base of schedules": {"lr_scheduler": "torch.optim.lr_scheduler.LRScheduler"},
    "a function as optimizer": {"optimizer": "os.system"},
    "a function as class": {"optimizer": {"class_path": "os.system", "init_args": {"command": "touch PWNED"}}},
    "a function as argument": {"lr_scheduler": {"class_path": LAMBDA, "init_args": {"lr_lambda": "os.system"}}},
    "a class as argument": {"lr_scheduler": {"class_path": LAMBDA, "init_args": {"lr_lambda": "evilmod.X"}}},
    "the module itself": {"_class_path": "evilmod.X"},
    "the module under another key": {"__class_path__": "subprocess.Popen"},
    "the builder": {"_instantiator": "os.system"},
}


class Marker:
    """Unpickling this runs a command."""

    def __reduce__(self):
        import os

        return (os.system, ("touch PWNED",))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a module and a YAML that no file may reach; what ran or was imported afterwards is an error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("DIFFUSION_LIT_TRUST", raising=False)
    (tmp_path / "evilmod.py").write_text("open('PWNED', 'w')\nclass X:\n    pass\n")
    (tmp_path / "ossfs.py").write_text("open('PWNED', 'w')\n")  # what fsspec imports for oss://
    (tmp_path / "evil.yaml").write_text("class_path: evilmod.X\n")
    yield tmp_path
    assert not (tmp_path / "PWNED").exists()
    assert not {"evilmod", "ossfs"} & sys.modules.keys()


def test_what_is_sound_is_built(here):
    assert type(load_module(write(here / "a.ckpt", checkpoint()))).__name__ == "EDM"
    assert load_data(here / "a.ckpt").batch_size == 16
    export(str(here / "a.ckpt"), str(here / "model"))
    assert type(load_module(here / "model")).__name__ == "EDM"
    assert type(load_module(write(here / "l.ckpt", latent()))).__name__ == "LatentDiffusion"
    assert classifier_from_checkpoint(write(here / "c.ckpt", classifier()))(torch.zeros(1, 1, 8, 8)).shape == (1, 10)


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_checkpoint_and_no_export_names_what_it_may_not(here, attack):
    path = write(here / "evil.ckpt", checkpoint(hyper_parameters={**RECORD, **ATTACKS[attack]}))
    with pytest.raises(ValueError, match=r"evil\.ckpt names"):
        load_module(path)
    export(str(write(here / "good.ckpt", checkpoint())), str(here / "model"))
    record = json.loads((here / "model/model.json").read_text())
    record.pop("record_crc32")
    record["hyper_parameters"].update(json.loads(json.dumps(ATTACKS[attack])))
    (here / "model/model.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"model names"):
        load_module(here / "model")


@pytest.mark.parametrize("attack", [OWN, COMMAND, APPLY])
def test_no_data_no_autoencoder_and_no_classifier_does(here, attack):
    for record in ({**DATA, "batch_size": attack}, {"_class_path": attack["class_path"]}, {**DATA, "x": [attack]}):
        with pytest.raises(ValueError, match="names"):
            load_data(write(here / "data.ckpt", checkpoint(datamodule_hyper_parameters=record)))
    subset = {"_class_path": "datamodules.Subset", "count": 1, "data": attack}
    with pytest.raises(ValueError, match="names"):
        load_data(write(here / "data.ckpt", checkpoint(datamodule_hyper_parameters=subset)))
    for changes in (attack, {"init_args": {"x": attack}}):
        with pytest.raises(ValueError, match="names"):
            load_autoencoder(str(write(here / "vae.ckpt", autoencoder(**changes))))
        with pytest.raises(ValueError, match="names|autoencoder"):
            load_module(write(here / "latent.ckpt", latent(**changes)))
    with pytest.raises(ValueError, match="cannot be built"):
        classifier_from_checkpoint(write(here / "classifier.ckpt", classifier(x=attack)))


@pytest.mark.parametrize(
    "command",
    [
        ["sample", "--num_samples=1", "--device=cpu"],
        ["evaluate", "--num_samples=2", "--extractor=pixels"],
        ["export", "--out=o"],
        ["edit", "forward"],
    ],
    ids=lambda command: command[0],
)
def test_no_command_runs_one(here, capsys, command):
    for attack in ("a command under any value", "a module of the folder"):
        write(here / "evil.ckpt", checkpoint(hyper_parameters={**RECORD, **ATTACKS[attack]}))
        with pytest.raises(SystemExit) as stopped:
            cli.main([*command, "--ckpt_path", "evil.ckpt"])
        assert stopped.value.code == 2
        assert "--trust" in capsys.readouterr().err


def test_a_report_says_what_it_did_not_build(here, capsys):
    attack = ATTACKS["a class that calls what it is given"]
    write(here / "version_0/checkpoints/last.ckpt", checkpoint(hyper_parameters={**RECORD, **attack}))
    cli.main(["report", "--run", "version_0"])
    assert "--trust torchvision" in capsys.readouterr().out


def pickles(path, how):
    if how == "torch":
        torch.save({"state_dict": {}, "x": Marker()}, path)
    else:
        path.write_bytes(pickle.dumps(Marker(), protocol=int(how)))
    return path


@pytest.mark.parametrize("how", ["torch", "0", "2", "4"])
def test_no_pickle_runs_in_any_reader(here, how, monkeypatch):
    bad = pickles(here / "bad.ckpt", how)
    words = "holds objects other than tensors and plain values and was not loaded"
    for read in (
        read_checkpoint,
        load_module,
        load_data,
        classifier_from_checkpoint,
        lambda p: load_autoencoder(str(p)),
    ):
        with pytest.raises(ValueError, match=words):
            read(bad)
    with pytest.raises(ValueError, match="only running code would make"):
        read_state(bad, "Inception")
    for name in ("w.safetensors", "r.safetensors", "r.npz", "r.pkl", "averages/step_0000001_sigma_0.05.safetensors"):
        (here / name).parent.mkdir(exist_ok=True)
        pickles(here / name, how)
    with pytest.raises(ValueError):
        read_state(here / "w.safetensors", "Inception")
    for name in ("r.safetensors", "r.npz", "r.pkl"):
        with pytest.raises(ValueError, match=name):
            reference_from_file(here / name, Pixels(), (1, 8, 8))
    np.savez(here / "objects.npz", mu=np.array([Marker()], dtype=object), sigma=np.zeros(1))
    with pytest.raises(ValueError, match=r"objects\.npz"):
        reference_from_file(here / "objects.npz", Pixels(), (1, 8, 8))
    with pytest.raises(ValueError):
        combined(here / "averages")
    assert read_tensors(here / "r.safetensors", {}) is None
    with pytest.raises(ValueError):
        read_record(here / "r.safetensors")
    assert _read(here / "r.safetensors") is None
    with pytest.raises(ValueError):
        read_pickle(bad)
    export(str(write(here / "good.ckpt", checkpoint())), str(here / "model"))
    pickles(here / "model/model.safetensors", how)
    with pytest.raises(ValueError):
        load_module(here / "model")


def test_the_sentence_for_a_pickle_does_not_hang_on_the_words_of_torch(here, monkeypatch):
    bad = pickles(here / "bad.ckpt", "torch")

    def load(*args, **kwargs):
        raise pickle.UnpicklingError("said otherwise")

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(ValueError, match="would run code from the file"):
        read_checkpoint(bad)


def test_what_a_file_may_name(here, monkeypatch):
    names = ["torch.optim.AdamW", "torch.optim.adam.Adam", "torch.optim.lr_scheduler.CosineAnnealingLR"]
    names += ["lightning.pytorch.cli.ReduceLROnPlateau", "diffusion_lit.nets.UNet", "datamodules.Digits"]
    for name in names:
        assert find_class(name).__name__ == name.rpartition(".")[2]
    for name in (
        *(
            "os.system",
            "UNet",
            "diffusion_lit.commands.main.Command",
            "diffusion_lit.commands.fit.CLI",
            "diffusion_litx.nets.UNet",
        ),
        *("lightning.pytorch.cli.LightningCLI", "torch.optim.Optimizerx", "datamodules.base.np.ndarray", "", 3, None),
        *("diffusion_lit.nets", "diffusion_lit.nets.UNet.forward", "datamodules..Digits", ["datamodules.Digits"]),
    ):
        with pytest.raises(Untrusted):
            find_class(name)
    cycle = []
    cycle.append({"x": cycle})
    check(cycle)
    (here / "minemod.py").write_text("import os\nfrom torch.nn import Sequential\nclass Net(Sequential):\n    pass\n")
    for given in ("option", "variable"):
        if given == "variable":
            monkeypatch.setenv("DIFFUSION_LIT_TRUST", "other, minemod")
        with trusting(["minemod"] if given == "option" else []):
            assert find_class("minemod.Net").__module__ == "minemod"
            for name in ("minemod.Sequential", "minemod.os.system", "minemod2.Net", "evilmod.X"):
                with pytest.raises(Untrusted):
                    find_class(name)
        monkeypatch.delenv("DIFFUSION_LIT_TRUST", raising=False)
        with pytest.raises(Untrusted, match="--trust minemod"):
            find_class("minemod.Net")
    monkeypatch.delitem(sys.modules, "minemod")


def test_data_of_ones_own_is_found_where_it_is_trusted_and_only_there(here, monkeypatch):
    (here / "mydata.py").write_text("from datamodules import Digits\n\n\nclass Mine(Digits):\n    pass\n")
    path = write(here / "own.ckpt", checkpoint(datamodule_hyper_parameters={**DATA, "_class_path": "mydata.Mine"}))
    with pytest.raises(ValueError, match="--trust mydata"):
        load_data(path)
    assert "mydata" not in sys.modules
    with trusting(["mydata"]):
        assert type(load_data(path)).__name__ == "Mine"
    seen = []
    monkeypatch.setattr(cli, "_run", lambda args: seen.append((args, find_class("mydata.Mine").__name__)))
    cli.main(["sample", "--trust", "mydata", "--num_samples=1", "--trust=evilmod"])
    assert seen == [(["sample", "--num_samples=1"], "Mine")]
    monkeypatch.delitem(sys.modules, "mydata")


def test_a_pretrained_folder_names_no_code(here):
    index = {"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]}
    for change in ({"unet": ["evilmod", "X"]}, {"unet": "evilmod.X"}, {"_class_name": ["evilmod.py", "X"]},
                   {"unet": ["diffusers", "os.system"]}):  # fmt: skip
        (here / "model_index.json").write_text(json.dumps({**index, **change}))
        with pytest.raises(ValueError, match="evilmod|os.system"):
            refuse_foreign_parts(here, ("unet",))
    (here / "model_index.json").write_text(json.dumps({**index, "vae": [None, None], "safety_checker": ["x", "Y"]}))
    refuse_foreign_parts(here, ("unet", "vae"))
    part = here / "unet"
    part.mkdir()
    for config in ({"auto_map": {"AutoModel": "evilmod.X"}}, {"quantization_config": {"quant_method": "x"}},
                   {"trust_remote_code": True}, {"_attn_implementation": "owner/kernel"}):  # fmt: skip
        (part / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=f"{next(iter(config))}|owner/kernel"):
            refuse_code(part)
    (part / "config.json").write_text(json.dumps({"_attn_implementation": "eager", "auto_map": None}))
    refuse_code(part)
    (part / "m.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": "../x.bin"}}))
    with pytest.raises(ValueError, match=r"x\.bin"):
        refuse_code(part)
    for path in part.iterdir():
        path.unlink()
    pickles(part / "diffusion_pytorch_model.bin", "torch")
    with pytest.raises(ValueError, match="a pickle"):
        load_part(None, part)


def test_a_file_chooses_no_place_to_write_to(here, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(here / "cache"))
    monkeypatch.delenv("DIFFUSION_LIT_CACHE", raising=False)

    def download(*args, **kwargs):
        raise OSError("downloads")

    for module in ("mnist", "cifar10"):
        monkeypatch.setattr(f"datamodules.{module}.download", download)
    for kind in (MNIST, CIFAR10):
        record = {"_class_path": f"datamodules.{kind.__name__}", "batch_size": 4, "root": "chosen", "download": True}
        path = write(here / "data.ckpt", checkpoint(datamodule_hyper_parameters=record))
        for written in (path, write(here / "subset.ckpt", checkpoint(datamodule_hyper_parameters=nested(record)))):
            with pytest.raises(FileNotFoundError, match="--data_root"):
                load_data(written).prepare_data()
            assert not Path("chosen").exists()
        with pytest.raises(FileNotFoundError, match="downloads"):
            load_data(path, root="named").prepare_data()
        assert Path("named").exists()
    (here / "chosen").mkdir()
    (here / "chosen/cifar-10-python.tar.gz").write_bytes(b"an archive")
    with pytest.raises(FileNotFoundError, match="--data_root"):
        load_data(path).prepare_data()
    from PIL import Image

    Path("images").mkdir()
    for index in range(12):
        Image.fromarray(np.full((8, 8, 3), 20 * index, np.uint8)).save(f"images/{index}.png")
    record = {"_class_path": "datamodules.ImageFolder", "root": "images", "batch_size": 2, "image_size": 8}
    record["cache_dir"] = "chosen/cache"
    data = load_data(write(here / "data.ckpt", checkpoint(datamodule_hyper_parameters=record)))
    assert isinstance(data, ImageFolder)
    data.prepare_data()
    assert not Path("chosen/cache").exists() and list(Path("cache").rglob("images.u8"))
    assert ImageFolder("images", 2, 8, cache_dir="mine").cache_dir == Path("mine")
    assert Subset(Digits(16), 3).writes_root


def nested(record):
    args = {name: value for name, value in record.items() if name != "_class_path"}
    inner = {"class_path": record["_class_path"], "init_args": args}
    return {"_class_path": "datamodules.Subset", "count": 2, "data": inner}


@pytest.mark.parametrize("name", ["Digits", "Subset"])
def test_data_without_a_folder_takes_no_root(here, name):
    record = {"_class_path": f"datamodules.{name}", "batch_size": 4}
    record = nested(record) if name == "Subset" else record
    path = write(here / "data.ckpt", checkpoint(datamodule_hyper_parameters=record))
    with pytest.raises(ValueError, match=rf"{name}, the data of .*has no root, so that --data_root there") as caught:
        load_data(path, root="there")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    if name == "Digits":
        assert load_data(path).batch_size == 4
