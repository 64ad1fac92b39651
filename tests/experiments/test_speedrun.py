"""The speedrun: a receipt holds when it is done again, and fails where a figure, the config or the data is another."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from helpers.in_process import run_in_process

from diffusion_lit.commands.main import main
from diffusion_lit.diffusion import Sampling
from diffusion_lit.evaluation.features import MissingWeights
from diffusion_lit.modules import EDM, WarmupStableDecay
from diffusion_lit.nets.classifier import ConvClassifier
from experiments.benchmarks import seeds, speedrun, tracks, verification
from experiments.benchmarks.contenders import installed
from experiments.benchmarks.entries import Entry, read_entry
from experiments.benchmarks.fit_training import own_part
from experiments.benchmarks.tracks import TRACKS, Judge, LockedClassifier
from experiments.benchmarks.trainings import GUIDED, UNGUIDED, Clock, Training
from experiments.benchmarks.verification import verify_receipt
from experiments.harness.configs import merge

NAME = "digits_seconds"


@pytest.fixture
def track(monkeypatch, tmp_path):
    """The small track with less of everything, its processes being calls."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIFFUSION_LIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(TRACKS, NAME, replace(TRACKS[NAME], minutes=0.02, seeds=(0,), num_samples=20, replayed=2))
    monkeypatch.setattr("experiments.benchmarks.fit_training.PACE_STEPS", 3)
    return run_in_process(monkeypatch, seeds)


def entry_file(tmp_path, **changes):
    """An entry: the track's own, narrowed."""
    told = {"model.init_args.net.init_args.model_channels": 8, "data.init_args.batch_size": 8}
    told |= {"model.init_args.sampling": {"sampler": "euler", "num_steps": 2, "cfg_scale": 2.0}}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"config": "configs/edm_digits.yaml", "options": {**told, **changes}}))
    return str(path)


@pytest.mark.parametrize(("slower", "since"), [(2.0, 0), (0.5, 0), (1.5, 150)])
def test_a_schedule_that_decays_last_is_fitted_to_a_pace_that_changes(slower, since):
    """A run planned for 1,000 steps of 0.1 s, whose steps take another time; replayed, its rates are the same."""
    clock, optimizer = Clock(), torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = WarmupStableDecay(optimizer, warmup_steps=10, decay_fraction=0.4, total_steps=1000)
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(max_steps=1000))
    clock.seconds, clock.every, clock.times, clock.first = 100.0, 50, [0.0], "known"
    trainer = SimpleNamespace(fit_loop=loop, lr_scheduler_configs=[SimpleNamespace(scheduler=schedule)])
    trainer.should_stop, module = False, EDM(torch.nn.Linear(1, 1))
    now, step, rates = 0.0, 0, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("experiments.benchmarks.trainings.time.perf_counter", lambda: now)
        while not trainer.should_stop and step < loop.epoch_loop.max_steps:
            now, step = now + 0.1 * (slower if step >= since else 1), step + 1
            optimizer.step()
            schedule.step()
            rates.append(schedule.get_last_lr()[0])
            trainer.global_step, trainer.max_steps = step, loop.epoch_loop.max_steps
            clock.on_train_batch_end(trainer, module, None, None, 0)
    assert step == schedule.total_steps and 0.9 * 100 < now <= 100
    assert rates[-1] == 0 and rates[15] == 1
    again = WarmupStableDecay(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0), 10, 0.4, step)
    assert rates == [again.factor(one) for one in range(1, step + 1)]


@pytest.mark.parametrize(("seconds", "told"), [(55.0, False), (40.0, True)])
def test_time_that_a_schedule_left_over_is_told(track, tmp_path, monkeypatch, capsys, seconds, told):
    facts = {"steps": 1000, "planned": 1000, "seconds": seconds}
    monkeypatch.setattr(seeds, "_work", lambda place, training: (place / "record.json").write_text(json.dumps(facts)))
    training = Training(read_entry("diffusion-lit", NAME), TRACKS[NAME], 0, minutes=1.0)
    seeds.train(tmp_path / "seed_0", training)
    assert ("took 40 of its 60 s" in capsys.readouterr().err) is told


@pytest.mark.slow
def test_a_receipt_holds_and_fails_where_it_was_edited(track, tmp_path, capsys):
    out = tmp_path / "out"
    mine = entry_file(tmp_path)
    receipt = speedrun.speedrun(NAME, mine, out=str(out))
    (one,) = receipt["runs"]
    assert one["images"] == 8 * one["steps"] and one["steps"] % 2 == 0
    assert one["before"] == one["steps"] - 2 and one["seconds"] < 60 * TRACKS[NAME].minutes * 1.5
    assert one["evaluations"] == {GUIDED: 4, UNGUIDED: 4}
    assert receipt["entry"]["config"]["model"]["class_path"] == "diffusion_lit.modules.EDM"
    ran = len(track)
    assert speedrun.speedrun(NAME, mine, out=str(out))["runs"] == receipt["runs"] and len(track) == ran  # none again
    path = out / "receipt.json"
    verify_receipt(path, None, None, mine)
    assert f"{path} holds." in capsys.readouterr().out
    parts = [(training.resume is not None, training.stop) for _, training in track[ran:]]
    assert parts == [(False, 2), (True, one["steps"])]

    def edited(change):
        told = json.loads(json.dumps(receipt))
        change(told)
        (out / "edited.json").write_text(json.dumps(told))
        return out / "edited.json"

    def other_figures(told):
        told["runs"][0]["figures"][GUIDED] *= 0.99
        told["summary"][UNGUIDED]["mean"] *= 0.99

    with pytest.raises(ValueError, match=f"seed 0 {GUIDED}.*measured again.*mean {UNGUIDED}"):
        verify_receipt(edited(other_figures), None, None)
    ran = len(track)
    with pytest.raises(ValueError, match="another config than"):
        verify_receipt(path, None, None, entry_file(tmp_path, **{"data.init_args.batch_size": 16}))
    with pytest.raises(ValueError, match="of a track digits_seconds other than"):
        verify_receipt(edited(lambda told: told["track"].update(minutes=7)), None, None)
    with pytest.raises(ValueError, match="holds the Python file mine.py"):
        verify_receipt(edited(lambda told: told["entry"].update(code="1/0", module="mine")), None, None)
    with pytest.raises(ValueError, match="os.system"):
        loss = {"model.init_args.loss": {"class_path": "os.system"}}
        verify_receipt(edited(lambda told: told["entry"]["options"].update(loss)), None, None)
    assert len(track) == ran  # told before anything is trained
    (out / "seed_0/previous.ckpt").unlink()
    with pytest.raises(ValueError, match="seed_0/previous.ckpt is missing.*--retrain"):
        verify_receipt(path, None, None)
    verify_receipt(path, None, None, retrain=True)
    with pytest.raises(ValueError, match="first steps.*last state"):
        rate = {"model.init_args.optimizer.init_args.lr": 0.001}
        verify_receipt(edited(lambda told: told["entry"]["options"].update(rate)), None, None, retrain=True)


def test_each_part_of_a_receipt_is_compared(track, tmp_path, monkeypatch, capsys):
    """With trainings that are made up, as a function of the entry, the seed and the part."""

    def made_up(place, training):
        place.mkdir(parents=True, exist_ok=True)
        generator = torch.Generator().manual_seed(training.seed + int(training.entry.key[:6], 16))
        images = torch.randint(0, 256, (20, 8, 8, 1), dtype=torch.uint8, generator=generator)
        np.savez(place / "samples.npz", **{GUIDED: images.numpy()})
        (place / "previous.ckpt").touch()
        steps = training.stop or 10
        hashes = {part: f"{training.entry.key[:8]} {training.seed} {part}" for part in ("first", "end")}
        facts = {"steps": steps, "images": 8 * steps, "batch_size": 8, "planned": 10, "seconds": 1.0, "before": 8}
        facts |= {"hashes": hashes, "evaluations": {GUIDED: 4}}
        (place / "record.json").write_text(json.dumps(facts))
        return facts

    monkeypatch.setattr(seeds, "train", made_up)
    monkeypatch.setattr(verification, "train", made_up)
    path = tmp_path / "out/receipt.json"
    receipt = speedrun.speedrun(NAME, entry_file(tmp_path), out=str(path.parent))
    verify_receipt(path, None, None)
    assert "holds." in capsys.readouterr().out
    one, edits = receipt["runs"][0], {}
    edits["seed 0 as configured"] = lambda told: told["runs"][0]["figures"].update(
        {GUIDED: one["figures"][GUIDED] + 0.01}
    )
    edits["mean as configured"] = lambda told: told["summary"][GUIDED].update(mean=1.0)
    edits["real images"] = lambda told: told["real_against_real"].update(figure=0.1)
    edits["after the first steps"] = lambda told: told["runs"][0]["hashes"].update(first="0")
    edits["last state"] = lambda told: told["runs"][0]["hashes"].update(end="0")
    edits["first steps.*last state.*as configured"] = lambda told: told["entry"]["options"].update(seed_everything=1)
    edits["seed 0's images"] = lambda told: told["runs"][0].update(images=160)
    edits["the track has less"] = lambda told: told["runs"][0].update(seconds=100.0)
    edits["the training images"] = lambda told: told.update(images="0")
    edits["changed after it was written"] = lambda told: told["versions"].update(commit="0123456789ab")
    edits["the extractor"] = lambda told: told["extractor"].update(transform="none")
    for words, edit in edits.items():
        told = json.loads(path.read_text())
        edit(told)
        (path.parent / "edited.json").write_text(json.dumps(told))
        with pytest.raises(ValueError, match=f"does not hold.*{words}"):
            verify_receipt(path.parent / "edited.json", None, None)
    told = json.loads(path.read_text())
    told["hardware"]["processor"] = "abacus"
    told["runs"][0]["hashes"]["end"] = "of other bits"
    told["sha256"] = verification.seal(told)
    (path.parent / "edited.json").write_text(json.dumps(told))
    verify_receipt(path.parent / "edited.json", None, None)
    assert "as far as other hardware can tell" in capsys.readouterr().out


def odd(change):
    """A receipt of the right form but for one thing."""
    run = dict.fromkeys(("seed", "steps", "images", "batch_size", "planned"), 1)
    run |= {
        "seconds": 1.0,
        "before": None,
        "hashes": {"first": None, "end": ""},
        "evaluations": {},
        "figures": {GUIDED: 1.0},
    }
    told = {key: {} for key in ("track", "versions", "hardware", "extractor")}
    told |= {"entry": vars(Entry("a")), "images": "", "real_against_real": None, "runs": [run], "sha256": ""}
    told["summary"] = {GUIDED: {"mean": 1.0, "deviation": None}}
    told = json.loads(json.dumps(told))
    change(told)
    return json.dumps(told)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "Expecting value"),
        ("\x00\xff", "receipt"),
        ("[]", "it is a list"),
        ("3", "it is an int"),
        ("{}", "it has no 'track'"),
        (odd(lambda told: told.pop("sha256")), "it has no 'sha256'"),
        (odd(lambda told: told.update(runs={})), "it has a 'runs' that is {}"),
        (odd(lambda told: told.update(runs=[])), "it has no runs"),
        (odd(lambda told: told["runs"].append(3)), "a run is an int"),
        (odd(lambda told: told["runs"][0].pop("hashes")), "a run has no 'hashes'"),
        (odd(lambda told: told["runs"][0].update(seed="0")), "a run has a 'seed' that is '0'"),
        (odd(lambda told: told["runs"][0].update(steps=True)), "a run has a 'steps' that is True"),
        (odd(lambda told: told["runs"][0]["figures"].update({GUIDED: "low"})), "the figures of a run ha"),
        (odd(lambda told: told["summary"].update({GUIDED: [1.0]})), "its summary has a"),
        (odd(lambda told: told["summary"][GUIDED].update(mean="1")), "its as configured has a 'mean'"),
        (odd(lambda told: told["entry"].update(options=[])), "its entry has a 'options'"),
        (odd(lambda told: told["entry"].pop("width")), "its entry has no 'width'"),
        (odd(lambda told: told["entry"].update(colour=3)), "its entry has a 'colour'"),
        (odd(lambda told: told["runs"][0]["hashes"].pop("end")), "the hashes of a run has no 'end'"),
        (odd(lambda told: None), "of a track None other than"),
    ],
)
def test_what_is_no_receipt_is_told(tmp_path, content, words):
    (tmp_path / "receipt.json").write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=f"receipt.json is .*{words}") as told:
        speedrun.speedrun(verify=str(tmp_path / "receipt.json"))
    assert "\n" not in str(told.value)
    with pytest.raises(ValueError, match=r"none.json is no receipt.*No such file"):
        speedrun.speedrun(verify=str(tmp_path / "none.json"))


PEERS = [name for name in ("smalldiffusion", "denoising-diffusion-pytorch", "diffusers") if name in installed()]


@pytest.mark.slow
@pytest.mark.parametrize("name", PEERS)
def test_another_librarys_training_goes_on_from_its_state(track, tmp_path, name, monkeypatch):
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setitem(tracks.TRACKS, NAME, replace(TRACKS[NAME], num_samples=4, evaluations=2, minutes=0.01))
    path = tmp_path / "peer.yaml"
    path.write_text(yaml.safe_dump({"contender": name, "width": 8, "batch_size": 4}))
    receipt = speedrun.speedrun(NAME, str(path), out=str(tmp_path / "out"))
    assert receipt["runs"][0]["images"] == 4 * receipt["runs"][0]["steps"] > 0
    verify_receipt(tmp_path / "out/receipt.json", None, None)


def test_the_tracks_are_locked(tmp_path):
    for name, track in TRACKS.items():
        assert (track.images is None) == ("CIFAR10" in track.data), name
        assert track.measure is not None, name
        assert isinstance(read_entry("diffusion-lit", name), Entry)
    assert len({track.key for track in TRACKS.values()}) == len(TRACKS)
    track = TRACKS[NAME]
    judge = Judge(track, track.make_data(None, 1))
    assert judge.metric == "fd_classifier" and 0 < judge.floor[0] < 10
    with pytest.raises(ValueError, match="needs the published files"):
        replace(track, images="0" * 64).make_data(None, 1)
    with pytest.raises(ValueError, match="needs the published weights"):
        Judge(replace(track, measure="0" * 64), track.make_data(None, 1))


def test_every_entry_that_ships_is_within_its_tracks_evaluations(tmp_path, capsys):
    for path in sorted(tracks.SPEEDRUNS.glob("*/*.yaml")):
        entry = read_entry(path.stem, path.parent.name)
        merged = merge(own_part(entry), entry.options)
        (tmp_path / "entry.yaml").write_text(yaml.safe_dump(merged))
        with pytest.raises(SystemExit) as ended:
            main(["fit", f"--config={tmp_path / 'entry.yaml'}", "--print_config"])
        assert not ended.value.code, (path, capsys.readouterr().err)
        sampling = Sampling(**merged["model"]["init_args"]["sampling"])
        guided = 1 + (sampling.cfg_scale not in (0, 1))
        assert 0 < guided * sampling.nfe <= TRACKS[path.parent.name].evaluations, path
    capsys.readouterr()
    for name in PEERS:
        assert read_entry(name, "fashion_mnist").contender == name


def test_the_locked_classifier_reads_digits():
    data = TRACKS[NAME].make_data(None, 1)
    extractor = LockedClassifier(tracks.SPEEDRUNS / "classifier_Digits.safetensors")
    extractor.load()
    made = extractor.extract(data.reference_images("val"))
    assert isinstance(extractor.network, ConvClassifier)
    assert (made.logits.argmax(1) == data.reference_labels("val")).float().mean() > 0.95


def test_a_track_whose_extractor_is_missing_is_refused_in_a_sentence(monkeypatch):
    def missing(name, *_):
        raise ValueError(f"There is no extractor {name!r}")

    monkeypatch.setattr(tracks, "make_extractor", missing)
    with pytest.raises(MissingWeights, match="measured by the extractor efficientnet_lite0, which is not to be had"):
        TRACKS["cifar10"].make_extractor(TRACKS[NAME].make_data(None, 1))


@pytest.mark.medium
def test_what_takes_no_part_is_told(track, tmp_path, capsys):
    bad = tmp_path / "bad.yaml"
    for content, words in {
        "config: configs/edm_digits.yaml\noptions: {ckpt_path: last.ckpt}": "ckpt_path.*from scratch",
        "config: configs/edm_digits.yaml\nmore: 1": "says more",
        "contender: nobody": "nobody is no library",
        "[]": "is no entry",
        "config: configs/edm_digits.yaml\ncode: missing.py": "missing.py, which is not there",
        "config: configs/edm_digits.yaml\noptions: {model.init_args.sampling: {guide_ckpt: bad.yaml}}": "names bad",
        "config: configs/edm_digits.yaml\noptions: {model.init_args.vae_ckpt: bad.yaml}": "bad.yaml in its model",
        "config: configs/edm_digits.yaml\noptions: [fast]": "the options",
        "contender: smalldiffusion\nwidth: wide": "width is 'wide'|no library",
        "a: b: c": "no YAML",
    }.items():
        bad.write_text(content)
        with pytest.raises(ValueError, match=words):
            read_entry(str(bad), NAME)
    with pytest.raises(ValueError, match="no entry nobody.*diffusion-lit"):
        read_entry("nobody", NAME)
    with pytest.raises(ValueError, match="no track 'mars'"):
        speedrun.speedrun("mars")
    mine = entry_file(tmp_path, **{"model.init_args.sampling": {"sampler": "euler", "num_steps": 5}})
    with pytest.raises(seeds.TrainingFailed, match="status 2"):
        speedrun.speedrun(NAME, mine, out=str(tmp_path / "many"))
    assert "speedrun: mine evaluates its network 5 times per image" in capsys.readouterr().err
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="for a GPU"):
            speedrun.speedrun("cifar10_gpu", out=str(tmp_path / "gpu"))
