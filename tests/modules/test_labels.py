"""Classes from a command line, and guidance that would do nothing."""

from types import SimpleNamespace

import pytest

from diffusion_lit.diffusion.generate import Sampling
from diffusion_lit.modules import DDPM, EDM
from diffusion_lit.modules.labels import check_guidance, parse_labels
from diffusion_lit.nets import UNet


@pytest.mark.parametrize(("count", "classes"), [(64, 10), (1500, 1000), (10, 10), (3, 10), (7, 1), (60, 10), (99, 100)])
def test_all_classes_come_equally_often(count, classes):
    labels = parse_labels("all", count, classes).tolist()
    assert len(labels) == count
    numbers = [labels.count(label) for label in range(classes)]
    assert max(numbers) - min(numbers) <= 1
    assert labels == sorted(labels)
    assert parse_labels("3,3,7", 5, 10).tolist() == [3, 3, 7, 3, 3]
    assert parse_labels(None, 5, 10) is None
    with pytest.raises(ValueError, match="3 classes for 2 samples.*--num_samples 3"):
        parse_labels("3,3,7", 2, 10)


def model(num_classes=10, label_dropout=0.1, prompts=None):
    return SimpleNamespace(num_classes=num_classes, label_dropout=label_dropout, prompts=prompts)


@pytest.mark.parametrize(
    ("module", "scale", "labelled", "given", "words"),
    [
        (model(0), 7, False, {"cfg_scale": 7}, "unconditional, so that --cfg_scale 7 does nothing"),
        (model(0), 1, False, {"guidance_interval": (0.3, 5)}, "unconditional, so that --guidance_interval"),
        (model(), 7, False, {"cfg_scale": 7}, "--cfg_scale 7 does nothing without something to guide to; give a class"),
        (model(0, prompts=[]), 7, False, {"cfg_scale": 7}, "give --prompt TEXT"),
        (model(), 7, False, {"guidance_rescale": 0.7}, "--guidance_rescale 0.7 does nothing without"),
        (model(), 1, True, {"guidance_interval": (0.3, 5)}, "does nothing at cfg_scale 1"),
        (model(), 1, True, {"cfg_scale": 1, "guidance_rescale": 0.5}, "--guidance_rescale 0.5 does nothing"),
        (model(10, 0), 7, True, {"cfg_scale": 7}, "label_dropout 0, so that its null class, which cfg_scale 7 needs"),
        (model(10, 0), 2, True, {}, "label_dropout 0"),
        (model(10, 0), 0, True, {"cfg_scale": 0}, "label_dropout 0"),
        (model(10, 0), 1, False, {}, "through which it draws without classes"),
        (model(10, 1), 1, True, {}, "label_dropout 1, so that its classes are untrained"),
    ],
)
def test_guidance_that_does_nothing_is_refused(module, scale, labelled, given, words):
    with pytest.raises(ValueError, match=words.replace(".", r"\.")):
        check_guidance(module, Sampling(cfg_scale=scale), labelled, **given)


@pytest.mark.parametrize(
    ("module", "scale", "labelled", "given"),
    [
        (model(), 7, True, {"cfg_scale": 7, "guidance_interval": (0.3, 5), "guidance_rescale": 0.7}),
        (model(), 1, False, {"cfg_scale": 1}),
        (model(), 0, False, {"cfg_scale": 0}),
        (model(), 2, False, {}),  # the model's own strength, for whoever draws with classes
        (model(10, 0), 1, True, {"cfg_scale": 1}),
        (model(10, 1), 1, False, {}),
        (model(0, 0), 1, False, {}),
    ],
)
def test_guidance_that_acts_passes(module, scale, labelled, given):
    check_guidance(module, Sampling(cfg_scale=scale), labelled, **given)


@pytest.mark.parametrize("sampler", ["consistency", "meanflow"])
def test_a_scale_that_leaves_the_maps_of_a_model_of_few_steps_is_said(sampler, recwarn):
    own = Sampling(sampler=sampler, num_steps=1)
    for scale, labelled in ((0, True), (1, True), (3, False)):
        check_guidance(model(), own.replace(cfg_scale=scale), labelled)
    check_guidance(model(), Sampling(cfg_scale=3), True)
    assert not recwarn.list
    with pytest.warns(UserWarning, match=f"cfg_scale 3 mixes two images .* {sampler}.*only 0 and 1 are maps"):
        check_guidance(model(), own.replace(cfg_scale=3), True, cfg_scale=3)


@pytest.mark.parametrize("kind", [DDPM, EDM])
def test_guidance_by_a_class_that_training_leaves_out_is_refused_when_it_begins(kind):
    def begin(num_classes, cfg_scale, label_dropout):
        net = UNet(1, 8, num_classes, model_channels=8, channel_mult=(1,), num_blocks=1)
        kind(net, sampling=Sampling(cfg_scale=cfg_scale), label_dropout=label_dropout).on_fit_start()

    for scale in (0.0, 2.0):
        with pytest.raises(ValueError, match=rf"label_dropout is 0, .*cfg_scale {scale:g}.*set label_dropout to 0\.1"):
            begin(3, scale, 0.0)
    begin(3, 1.0, 0.0)
    begin(3, 2.0, 0.1)
    begin(0, 2.0, 0.0)  # an unconditional model has no classes to leave out
