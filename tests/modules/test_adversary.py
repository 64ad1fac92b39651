"""The adversary of a VAE: the two losses of the textbook in one, its rest until its start, and a run's promises."""

import copy
from types import SimpleNamespace

import pytest
import torch
from helpers.runs import NO_IMAGES, TINY_VAE, VAE_DIGITS, logged, read, same_training, stopped
from torch.nn import functional as F

from diffusion_lit.modules import VAE, Adversary, ClassifierPerceptual, EfficientNetPerceptual
from diffusion_lit.modules.perceptual import StageDistance
from diffusion_lit.nets import Autoencoder, ConvClassifier

RUN = ["fit", "--config", str(VAE_DIGITS), *TINY_VAE, *NO_IMAGES, "--trainer.callbacks=[]"]
RUN += ["--model.init_args.lr_scheduler=null", "--trainer.log_every_n_steps=1", "--ema.ramp_up=null"]
SHARP = ["--model.init_args.adversary=diffusion_lit.modules.Adversary"]
SHARP += ["--model.init_args.adversary.init_args.model_channels=8", "--model.init_args.adversary.init_args.levels=1"]
SHARP += ["--model.init_args.adversary.init_args.start_step=2", "--model.init_args.adversary.init_args.lr_ratio=0.5"]


def last(name):
    return read(f"runs/{name}/version_0/checkpoints/last.ckpt")


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tiny(**options):
    torch.manual_seed(0)
    return VAE(Autoencoder(1, 8, 2, 8, (1, 2)), adversary=Adversary(model_channels=8, levels=1, **options))


def learn_to_tell(module, image):
    """Trains the discriminator alone until it tells the images from their reconstructions."""
    optimizer = torch.optim.Adam(module.adversary.parameters(), 2e-3)
    for _ in range(200):
        terms = module.terms(image, "k")
        contest = module.adversary(image, terms.x_hat, terms.fidelity(), module.net.last_layer, 0)
        if contest.figures["discriminator"] < 0.8:
            break
        optimizer.zero_grad()
        contest.loss.backward()
        optimizer.step()
    module.zero_grad()


def test_an_adversary_that_cannot_tell_leaves_the_autoencoder_alone():
    module = tiny(weight=0.7)
    final = module.adversary.net.layers[-1]
    torch.nn.init.normal_(final.weight, std=1e-2)  # logits near 0: the ratio of gradients is large
    torch.nn.init.zeros_(final.bias)
    image = draw(5, 1, 8, 8).clamp(-1, 1)
    terms = module.terms(image, "k")
    fidelity, x_hat = terms.fidelity(), terms.x_hat
    contest = module.adversary(image, x_hat, fidelity, module.net.last_layer, 0)
    felt, own = (
        torch.autograd.grad(one, module.net.last_layer, retain_graph=True)[0].norm() for one in (contest.loss, fidelity)
    )
    assert float(felt) < 1e-3 * float(own)
    learn_to_tell(module, image)
    terms = module.terms(image, "k")
    contest = module.adversary(image, terms.x_hat, terms.fidelity(), module.net.last_layer, 0)
    assert float(contest.figures["lambda"]) > 0


def test_one_backward_pass_is_the_two_of_the_textbook():
    """The decoder's gradient is that of loss + w lambda adversarial, D's that of the hinge loss, each taken alone."""
    module = tiny(weight=0.7)
    image = draw(5, 1, 8, 8).clamp(-1, 1)
    learn_to_tell(module, image)

    def parts():
        terms = module.terms(image, "k")
        return terms, module.loss(terms, 64, 1.0)

    terms, loss = parts()
    contest = module.adversary(image, terms.x_hat, terms.fidelity(), module.net.last_layer, 0)
    (loss + contest.loss).backward()
    ours = {name: parameter.grad.clone() for name, parameter in module.named_parameters()}

    def gradients(value):
        module.zero_grad()
        value.backward(retain_graph=True)
        return {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}

    terms, loss = parts()
    judged = -module.adversary.net(terms.x_hat).mean()
    layer = next(name for name, one in module.named_parameters() if one is module.net.last_layer)
    fidelity, judgement = (gradients(value)[layer].norm().item() for value in (terms.fidelity(), judged))
    real, made = module.adversary.net(image), module.adversary.net(terms.x_hat.detach())
    hinge = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + made).mean())
    assert hinge.item() < 0.9
    scale = (1 - hinge.item()) * fidelity / (judgement + 1e-4)
    assert float(contest.figures["lambda"]) == pytest.approx(scale, rel=1e-4)
    alone = {name: grad.clone() for name, grad in gradients(loss + 0.7 * scale * judged).items()}
    for name, grad in alone.items():
        if not name.startswith("adversary"):
            torch.testing.assert_close(ours[name], grad, rtol=1e-3, atol=1e-6)
    assert float(contest.figures["discriminator"]) == pytest.approx(hinge.item(), rel=1e-5)
    for name, grad in gradients(hinge).items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-4, atol=1e-7)


def test_without_adaption_the_weight_is_as_given():
    module = tiny(weight=0.3, adaptive=False)
    image = draw(2, 1, 8, 8)
    terms = module.terms(image, "k")
    contest = module.adversary(image, terms.x_hat, terms.fidelity(), module.net.last_layer, 0)
    figures = contest.figures
    assert float(contest.loss.detach()) == pytest.approx(float(0.3 * figures["adversarial"] + figures["discriminator"]))


@pytest.mark.medium
def test_it_rests_until_its_start_and_the_average_is_of_the_autoencoder_alone(lightning, tmp_path):
    lightning(*RUN, *SHARP, "--trainer.max_steps=2", "--name=early")
    lightning(*RUN, *SHARP, "--trainer.max_steps=5", "--name=late")
    lightning(*RUN, "--trainer.max_steps=2", "--name=without")
    early, late, without = last("early"), last("late"), last("without")
    own = [name for name in without["state_dict"]]
    assert all(torch.equal(early["current_model_state"][name], without["current_model_state"][name]) for name in own)
    judge = [name for name in late["state_dict"] if name.startswith("adversary")]
    assert judge and set(own) | set(judge) == set(late["state_dict"])
    weights = [name for name in judge if "weight" in name]
    assert not any(torch.equal(early["state_dict"][name], late["state_dict"][name]) for name in weights)
    assert all(torch.equal(late["state_dict"][name], late["current_model_state"][name]) for name in judge)
    assert any(not torch.equal(late["state_dict"][name], late["current_model_state"][name]) for name in own)
    (state,) = late["optimizer_states"]
    own_group, judges = state["param_groups"]
    assert judges["lr"] == pytest.approx(own_group["lr"] / 2)
    assert {int(state["state"][index]["step"]) for index in own_group["params"]} == {5}
    assert {int(state["state"][index]["step"]) for index in judges["params"]} == {3}
    assert not set(early["optimizer_states"][0]["state"]) & set(judges["params"])


@pytest.mark.medium
def test_a_run_that_was_cut_goes_on_exactly_with_accumulation_in_bf16(lightning, tmp_path):
    more = [*RUN, *SHARP, "--trainer.accumulate_grad_batches=2", "--trainer.precision=bf16-mixed"]
    more += ["--trainer.gradient_clip_val=1.0"]
    for cut in (1, 3):  # before and after its start
        lightning(*more, f"--name=cut{cut}", f"--trainer.max_steps={cut}")
        lightning(*more, f"--name=cut{cut}", "--trainer.max_steps=5", "--ckpt_path=last")
    lightning(*more, "--name=whole", "--trainer.max_steps=5")
    assert same_training(last("cut1"), last("whole")) and same_training(last("cut3"), last("whole"))


@pytest.mark.medium
def test_two_ranks_train_as_one(lightning, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a fork must not inherit a pool
    try:
        more = [*RUN, *SHARP, "--trainer.precision=32-true", "--trainer.max_steps=6"]
        more += ["--trainer.accumulate_grad_batches=2"]
        lightning(*more, "--name=one")
        lightning(*more, "--name=two", "--trainer.devices=2", "--trainer.strategy=ddp_fork")
    finally:
        torch.set_num_threads(threads)
    for tag in ("train/loss", "train/lambda", "train/discriminator", "train/adversarial"):
        one, two = (logged(tmp_path / f"runs/{name}/version_0", tag) for name in ("one", "two"))
        assert one.keys() == two.keys() and len(one) == (6 if tag == "train/loss" else 4)
        assert list(two.values()) == pytest.approx(list(one.values()), rel=2e-3), tag
    one, two = last("one")["state_dict"], last("two")["state_dict"]
    for name, value in one.items():
        assert torch.allclose(value, two[name], atol=2e-3), name


@pytest.mark.medium
def test_the_second_phase_trains_the_decoder_alone_and_a_latent_model_takes_it(lightning, tmp_path, capsys):
    from helpers.runs import LATENT_DIGITS, TINY_LATENT

    lightning(*RUN, "--trainer.max_steps=3")
    second = [*RUN, *SHARP, "--model.init_args.frozen_encoder=runs/vae_digits", "--trainer.max_steps=4"]
    lightning(*second, "--name=second")
    still = [*second, "--trainer.max_steps=1", "--model.init_args.optimizer.init_args.lr=0.0", "--name=still"]
    lightning(*still)  # a step that moves nothing shows what it began with, the likelihood's scale included
    assert all(
        torch.equal(value, last("still")["state_dict"][name])
        for name, value in last("vae_digits")["state_dict"].items()
    )
    first, sharp, begun = (last(name)["state_dict"] for name in ("vae_digits", "second", "still"))
    assert not [name for name, value in first.items() if not torch.equal(value, begun[name])]
    moved = [name for name in first if not torch.equal(sharp[name], first[name])]
    assert moved and not any(name.startswith("net.encoder.") for name in moved)
    lightning("fit", "--config", LATENT_DIGITS, *TINY_LATENT, *NO_IMAGES, "--trainer.max_steps=2")
    model = "runs/latent_digits/version_0/checkpoints/last.ckpt"
    images = []
    import numpy as np

    for out, more in (("plain", []), ("sharp", ["--decoder=runs/second"])):
        lightning("sample", "--ckpt_path", model, "--num_samples=4", f"--out={out}", *more)
        images.append(np.load(tmp_path / out / "samples.npz")["arr_0"])
    assert (images[0] != images[1]).any()
    go_on = ["fit", "--config", LATENT_DIGITS, *TINY_LATENT, *NO_IMAGES, "--trainer.max_steps=3", "--ckpt_path=last"]
    lightning(*go_on, "--model.init_args.vae_ckpt=runs/second")  # its latents are the same ones
    space = read(tmp_path / model)["latent_space"]["state_dict"]
    assert all(torch.equal(value, sharp[f"net.{name}"]) for name, value in space.items())
    lightning(*RUN, "--trainer.max_steps=1", "--seed_everything=1", "--name=other")
    assert "another encoder" in stopped(capsys, lightning, "sample", "--ckpt_path", model, "--decoder=runs/other")
    other = [*RUN, "--model.init_args.frozen_encoder=runs/vae_digits", "--name=no"]
    said = stopped(capsys, lightning, *other, "--model.init_args.net.init_args.model_channels=16")
    assert "another autoencoder than this run's net" in said


def test_the_perceptual_distance_is_that_of_unit_features_and_its_classifier_is_its_own():
    torch.manual_seed(0)
    classifier = ConvClassifier(1, 16, 3, width=4).eval()
    distance = StageDistance(classifier).eval()
    x, x_hat = draw(3, 1, 16, 16), draw(3, 1, 16, 16, seed=1)
    expected = torch.zeros(3)
    a, b = x_hat, x
    for stage in classifier.stages:
        a, b = stage(a), stage(b)
        if not isinstance(stage, torch.nn.MaxPool2d):
            cosine = F.cosine_similarity(a, b, dim=1)  # of unit vectors |a - b|^2 = 2 - 2 cos, 1 where one is 0
            dead = (a.norm(dim=1) > 0).float() + (b.norm(dim=1) > 0).float()
            expected += (dead - 2 * cosine).mean((1, 2))
    torch.testing.assert_close(distance(x_hat, x), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(distance(x, x), torch.zeros(3))
    with pytest.raises(ValueError, match="not loaded"):
        ClassifierPerceptual()(x, x)


def test_the_classifier_that_a_loss_looks_through_is_not_the_one_that_measures(tmp_path, monkeypatch):
    import datamodules
    from diffusion_lit.modules import data_classifier

    monkeypatch.setenv("DIFFUSION_LIT_CACHE", str(tmp_path))
    monkeypatch.setattr(data_classifier, "IMAGES_SEEN", 256)
    data = datamodules.Digits(64)
    loss = ClassifierPerceptual(2.0)
    loss.load(data)
    measuring = data_classifier.classifier_of(data)
    mine, theirs = (next(net.parameters()) for net in (loss.frozen.net, measuring))
    assert mine.shape == theirs.shape and not torch.equal(mine, theirs)
    assert copy.deepcopy(loss) is loss and not mine.requires_grad
    module = VAE(Autoencoder(1, 8, 2, 8, (1, 2)), perceptual=loss)
    image = draw(4, 1, 8, 8)
    terms = module.terms(image, "k")
    torch.testing.assert_close(terms.perceptual, 2 * loss(terms.x_hat, image))
    plain = VAE.loss(module, terms._replace(perceptual=0 * terms.perceptual), 64, 1.0)
    torch.testing.assert_close(module.loss(terms, 64, 1.0), plain + terms.perceptual.mean())


def test_a_classifier_of_data_without_classes_is_refused_with_another_way():
    for labels in (None, torch.zeros(4, dtype=torch.int64)):
        data = SimpleNamespace(reference_labels=lambda split, labels=labels: labels)
        with pytest.raises(ValueError, match="no classes to tell apart; take EfficientNetPerceptual"):
            ClassifierPerceptual().load(data)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Adversary(weight=0), "weight is 0"),
        (lambda: Adversary(start_step=-1), "start_step is -1"),
        (lambda: Adversary(lr_ratio=float("nan")), "lr_ratio is nan"),
        (lambda: Adversary(levels=0), "levels is 0"),
        (lambda: ClassifierPerceptual(weight=0), "weight is 0"),
        (lambda: EfficientNetPerceptual(weight=-1), "weight is -1"),
        (
            lambda: VAE(Autoencoder(1, 8, 2, 8, (1, 2)), adversary=Adversary(levels=4, start_step=9000)),
            "image_size=8 is not a multiple of 16 .the adversary's levels are 4",
        ),
    ],
)
def test_what_it_cannot_be_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.medium
def test_a_checkpoint_of_the_second_phase_opens_nothing_and_goes_on_alone(lightning, tmp_path):
    import shutil

    from diffusion_lit.modules.load import load_module

    lightning(*RUN, "--trainer.max_steps=1")
    second = [*RUN, *SHARP, "--model.init_args.frozen_encoder=runs/vae_digits", "--name=second"]
    lightning(*second, "--trainer.max_steps=3")
    shutil.rmtree("runs/vae_digits")
    path = "runs/second/version_0/checkpoints/last.ckpt"
    assert load_module(path).frozen_encoder == "runs/vae_digits"
    lightning(*second, "--trainer.max_steps=4", "--ckpt_path=last")
    assert last("second")["global_step"] == 4
    lightning("export", "--ckpt_path", path, "--out=exported")
    again = load_module("exported").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in last("second")["state_dict"].items())
