"""Pretrained models: parity with diffusers' own pipelines on the same noise, prompts, files, and what is refused.

A sample here draws from the generator keyed by its seed, first its start and then each step; given the same generators,
a pipeline of diffusers draws the same numbers.
"""

import functools
import gc
import json
import shutil
import weakref

import diffusers
import pytest
import torch
import transformers
from helpers.pretrained_models import (
    STEPS,
    WORDS,
    if_scheduler,
    save_if,
    save_if_2,
    save_stable_diffusion,
    save_unet,
    unet_2d,
)
from safetensors.torch import load_file, save_file

from diffusion_lit.diffusion import LearnedVarianceDenoiser, Sampling, keyed_generator, keyed_seed
from diffusion_lit.pretrained import load_pretrained
from diffusion_lit.pretrained.prompts import embed_prompts

SEEDS = [3, 4, 11]
PROMPTS = WORDS[:2]
LABELS = torch.tensor([0, 1, 1])
SD_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFUSION_LIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd")
    return save_stable_diffusion(folder, diffusers.DDIMScheduler(**SD_BETAS, clip_sample=False, steps_offset=1)), folder


@pytest.fixture(scope="module")
def deep_floyd(tmp_path_factory):
    folder = tmp_path_factory.mktemp("if")
    return save_if(folder), folder


@pytest.fixture(scope="module")
def deep_floyd_2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("if2")
    return save_if_2(folder), folder


def last_state(pipeline, **arguments):
    """What the pipeline's last step gave: its images before they are clamped to [0, 1], or its latents."""
    states, step = [], pipeline.scheduler.step

    @functools.wraps(step)  # pipelines look at its signature
    def watched(*args, **options):
        made = step(*args, **options)
        states.append(made[0] if isinstance(made, tuple) else made.prev_sample)
        return made

    pipeline.scheduler.step = watched
    pipeline.set_progress_bar_config(disable=True)
    try:
        pipeline(output_type="pt", **{"num_inference_steps": STEPS, "generator": generators()} | arguments)
    finally:
        del pipeline.scheduler.step
    return states[-1]


def generators(*key):
    return [keyed_generator("sample", keyed_seed(*key, seed) if key else seed) for seed in SEEDS]


def assert_same(ours, theirs, scale=1.0):
    """The same up to rounding, which guidance enlarges by its scale."""
    difference = float((ours - theirs).abs().max() / (theirs.max() - theirs.min()).clamp(min=2))
    assert ours.shape == theirs.shape
    assert float(theirs.std()) > 0.05
    assert difference <= 1e-4 * scale, difference


CASES = {
    "ddpm": {},
    "ddpm, no clipping": {"clip_sample": False},
    "ddpm, clipped at 0.5": {"clip_sample_range": 0.5},
    "ddpm, variance beta, few steps, cosine": {
        "variance_type": "fixed_large", "num_train_timesteps": 64, "beta_schedule": "squaredcos_cap_v2"
    },
    "ddpm, dynamic threshold": {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.9},
    "ddpm, trailing, own betas": {
        "timestep_spacing": "trailing", "trained_betas": [0.01 + 0.002 * step for step in range(40)],
        "num_train_timesteps": 40,
    },
    "ddpm, linspace, sigmoid": {"timestep_spacing": "linspace", "beta_schedule": "sigmoid"},
    "ddpm, offset": {"steps_offset": 1},
}  # fmt: skip


PREDICTIONS = ["epsilon", "v_prediction", "sample"]


@pytest.mark.parametrize(
    ("case", "prediction"),
    [*((case, "epsilon") for case in CASES), *((case, kind) for case in list(CASES)[:2] for kind in PREDICTIONS[1:])],
)
def test_ddpm_pipeline(tmp_path, case, prediction):
    pipeline = save_unet(tmp_path, diffusers.DDPMScheduler(**CASES[case], prediction_type=prediction))
    model = load_pretrained(str(tmp_path))
    assert model.sampling.sampler == "ddpm"
    ours = model.generate(SEEDS, sampling=model.sampling.replace(num_steps=STEPS))
    assert_same(ours, last_state(pipeline, batch_size=3))


DDIM_CASES = {
    "ddim": {},
    "ddim, no clipping, ends above 0": {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1},
    "ddim, dynamic threshold, trailing": {
        "thresholding": True, "sample_max_value": 2.0, "timestep_spacing": "trailing", "clip_sample": False
    },
}  # fmt: skip


@pytest.mark.parametrize(("prediction", "eta"), [*((kind, 0.0) for kind in PREDICTIONS), ("epsilon", 0.6)])
@pytest.mark.parametrize("case", DDIM_CASES)
def test_ddim_pipeline(tmp_path, case, prediction, eta):
    pipeline = save_unet(tmp_path, diffusers.DDIMScheduler(**DDIM_CASES[case], prediction_type=prediction))
    model = load_pretrained(str(tmp_path))
    assert model.sampling.sampler == "ddim"
    options = {**model.sampling.sampler_options, "eta": eta}
    ours = model.generate(SEEDS, sampling=model.sampling.replace(num_steps=STEPS, sampler_options=options))
    assert_same(ours, last_state(pipeline, batch_size=3, eta=eta))


def test_a_schedule_that_ends_in_pure_noise(tmp_path):
    scheduler = diffusers.DDIMScheduler(
        rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction", clip_sample=False
    )
    pipeline = save_unet(tmp_path / "v", scheduler)
    model = load_pretrained(str(tmp_path / "v"))
    assert_same(
        model.generate(SEEDS, sampling=model.sampling.replace(num_steps=STEPS)), last_state(pipeline, batch_size=3)
    )
    save_unet(tmp_path / "eps", diffusers.DDPMScheduler(rescale_betas_zero_snr=True))
    with pytest.raises(ValueError, match="cannot start"):
        load_pretrained(str(tmp_path / "eps"))


def test_a_learned_variance(tmp_path):
    scheduler = diffusers.DDPMScheduler(variance_type="learned_range")
    pipeline = save_unet(tmp_path, scheduler, unet_2d(out_channels=6))
    model = load_pretrained(str(tmp_path))
    assert isinstance(model.denoiser, LearnedVarianceDenoiser)
    few = model.sampling.replace(num_steps=STEPS)
    ours = model.generate(SEEDS, sampling=few)
    assert_same(ours, last_state(pipeline, batch_size=3))
    fixed = few.replace(sampler_options={"variance": "posterior"})
    assert not torch.allclose(ours, model.generate(SEEDS, sampling=fixed), atol=0.1)


def test_channels_of_a_variance_that_the_scheduler_does_not_read_are_left_out(tmp_path):
    save_unet(tmp_path, diffusers.DDPMScheduler(), unet_2d(out_channels=6))
    model = load_pretrained(str(tmp_path))
    assert not isinstance(model.denoiser, LearnedVarianceDenoiser)
    assert model.generate([0], sampling=model.sampling.replace(num_steps=2)).shape == (1, 3, 8, 8)


def test_weights_beside_the_index_as_in_the_first_models_of_the_hub(tmp_path):
    save_unet(tmp_path / "new", diffusers.DDPMScheduler())
    old = tmp_path / "old"
    shutil.copytree(tmp_path / "new/unet", old)
    weights = load_file(old / "diffusion_pytorch_model.safetensors")
    for new_name, old_name in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
        weights = {name.replace(new_name, old_name): tensor for name, tensor in weights.items()}
    assert any("proj_attn" in name for name in weights)
    save_file(weights, old / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    shutil.copy(tmp_path / "new/model_index.json", old)
    shutil.copy(tmp_path / "new/scheduler/scheduler_config.json", old)
    few = Sampling("ddim", 3, "trailing")
    assert torch.equal(
        load_pretrained(str(old)).generate(SEEDS, sampling=few),
        load_pretrained(str(tmp_path / "new")).generate(SEEDS, sampling=few),
    )


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "ddpm", "ddim", "unipc"])
def test_every_sampler_and_grid_runs_between_the_steps_too(tmp_path, sampler):
    save_unet(tmp_path, diffusers.DDPMScheduler())
    model = load_pretrained(str(tmp_path))
    made = model.generate(SEEDS, sampling=Sampling(sampler, 4, "karras", clip_x0="static"))
    assert bool(made.isfinite().all())


def test_classes_without_a_null_class(tmp_path):
    pipeline = save_unet(tmp_path, diffusers.DDPMScheduler(), unet_2d(num_class_embeds=5))
    model = load_pretrained(str(tmp_path))
    assert model.num_classes == 5 and model.prompts is None and model.class_names == list("01234")
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    labels, t = torch.tensor([0, 4, 2]), 700
    with torch.no_grad():
        eps = pipeline.unet(x, t, class_labels=labels).sample
        sigma = float(model.denoiser.scaling.schedule.sigmas[t])
        spread = (1 + sigma**2) ** 0.5
        x0_hat = model.denoiser(x * spread, sigma, labels)
    torch.testing.assert_close(x0_hat, x * spread - sigma * eps, rtol=1e-4, atol=1e-3)
    few = model.sampling.replace(num_steps=2)
    for wrong in (lambda: model.generate([0], sampling=few), lambda: guided(model, few)):
        with pytest.raises(ValueError, match="no null class"):
            wrong()


def guided(model, sampling):
    return model.generate([0], torch.tensor([1]), sampling.replace(cfg_scale=2.0))


# Text models


@pytest.mark.medium
@pytest.mark.parametrize("kind", ["DDIMScheduler", "DDPMScheduler", "PNDMScheduler"])
def test_stable_diffusion(stable_diffusion, tmp_path, kind):
    pipeline, folder = stable_diffusion
    options = {} if kind == "PNDMScheduler" else {"clip_sample": False, "prediction_type": "v_prediction"}
    options |= {} if kind == "DDPMScheduler" else {"set_alpha_to_one": False}
    scheduler = getattr(diffusers, kind)(**SD_BETAS, steps_offset=1, **options)
    shutil.copytree(folder, tmp_path / "sd")
    scheduler.save_pretrained(tmp_path / "sd/scheduler")
    model = load_pretrained(str(tmp_path / "sd"), PROMPTS)
    assert (model.x_shape, model.image_shape, model.num_classes) == ((4, 8, 8), (3, 16, 16), 2)
    assert (model.sampling.num_steps, model.sampling.cfg_scale) == (50, 7.5)
    pipeline.scheduler = scheduler if kind != "PNDMScheduler" else diffusers.DDIMScheduler.from_config(
        scheduler.config, clip_sample=False
    )  # fmt: skip
    texts = [PROMPTS[label] for label in LABELS]
    for scale in (4.0, 1.0):
        latents = last_state(pipeline, prompt=texts, guidance_scale=scale)
        settings = model.sampling.replace(num_steps=STEPS, cfg_scale=scale)
        assert_same(settings.generate(model.denoiser, model.x_shape, SEEDS, LABELS), latents)
    with torch.no_grad():
        images = pipeline.vae.decode(latents / 0.3).sample
        torch.testing.assert_close(model.generate(SEEDS, LABELS, settings), images, rtol=1e-3, atol=1e-4)
        encoded = pipeline.vae.encode(images).latent_dist.mean * 0.3
        torch.testing.assert_close(model.encode(images), encoded)


@pytest.mark.medium
def test_the_negative_prompt_is_the_null_class(stable_diffusion):
    pipeline, folder = stable_diffusion
    model = load_pretrained(str(folder), PROMPTS, negative_prompt=WORDS[3])
    texts = [PROMPTS[label] for label in LABELS]
    pipeline.scheduler = diffusers.DDIMScheduler(**SD_BETAS, clip_sample=False, steps_offset=1)
    theirs = last_state(pipeline, prompt=texts, negative_prompt=[WORDS[3]] * 3, guidance_scale=3.0)
    settings = model.sampling.replace(num_steps=STEPS, cfg_scale=3.0)
    assert_same(settings.generate(model.denoiser, model.x_shape, SEEDS, LABELS), theirs)
    without = load_pretrained(str(folder))  # draws for the empty prompt
    assert without.num_classes == 0
    theirs = last_state(pipeline, prompt=[""] * 3, guidance_scale=1.0)
    assert_same(settings.generate(without.denoiser, without.x_shape, SEEDS), theirs)


@pytest.mark.parametrize("scheduler", ["if", "fixed variance", "ddim"])
def test_if_stage_1(deep_floyd, tmp_path, scheduler):
    pipeline, folder = deep_floyd
    made = {
        "if": if_scheduler(),
        "fixed variance": if_scheduler(variance_type="fixed_small", prediction_type="v_prediction"),
        "ddim": diffusers.DDIMScheduler(beta_schedule="squaredcos_cap_v2", thresholding=True, sample_max_value=1.5),
    }[scheduler]
    shutil.copytree(folder, tmp_path / "if")
    made.save_pretrained(tmp_path / "if/scheduler")
    model = load_pretrained(str(tmp_path / "if"), PROMPTS)
    assert isinstance(model.denoiser, LearnedVarianceDenoiser) == (scheduler == "if")
    assert (model.sampling.num_steps, model.sampling.cfg_scale) == (100, 7.0)
    # diffusers' own step of DDIM knows no learned variance, and leaves its channels out for variance types without it.
    pipeline.scheduler = made
    made.register_to_config(variance_type=made.config.get("variance_type", "fixed_small"))
    for scale in (1.0, 7.0):
        theirs = last_state(pipeline, prompt=[PROMPTS[label] for label in LABELS], guidance_scale=scale)
        ours = model.generate(SEEDS, LABELS, model.sampling.replace(num_steps=STEPS, cfg_scale=scale))
        assert_same(ours, theirs, scale)


@pytest.mark.medium
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_if_stage_2(deep_floyd, deep_floyd_2, scale):
    (first, folder), (second, folder_2) = deep_floyd, deep_floyd_2
    options = {"num_steps": STEPS, "cfg_scale": scale, "noise_level": 100}
    model = load_pretrained(str(folder), PROMPTS, stage_2=str(folder_2), stage_2_options=options)
    assert (model.x_shape, model.image_shape) == ((3, 8, 8), (3, 16, 16))
    small = load_pretrained(str(folder), PROMPTS).generate(
        SEEDS, LABELS, few := model.sampling.replace(num_steps=STEPS)
    )
    embeddings, negative = first.encode_prompt([PROMPTS[label] for label in LABELS])
    theirs = last_state(
        second,
        image=small,
        prompt_embeds=embeddings,
        negative_prompt_embeds=negative,
        guidance_scale=scale,
        noise_level=100,
        generator=generators("stage 2"),
    )
    assert_same(model.generate(SEEDS, LABELS, few), theirs)
    alone = model.generate(SEEDS[2:], LABELS[2:], few)
    torch.testing.assert_close(alone, model.generate(SEEDS, LABELS, few)[2:], rtol=1e-3, atol=1e-3)


# Prompts


@pytest.mark.medium
def test_prompts_are_embedded_as_the_pipelines_do(stable_diffusion, deep_floyd):
    for pipeline, folder in (stable_diffusion, deep_floyd):
        device = {} if pipeline is deep_floyd[0] else {"device": "cpu", "num_images_per_prompt": 1}
        theirs, empty = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=True, **device)
        torch.testing.assert_close(embed_prompts(folder, [*PROMPTS, ""]), torch.cat([theirs, empty[:1]]))


@pytest.mark.medium
def test_the_vocabularies_of_the_first_models_of_the_hub(stable_diffusion, deep_floyd, tmp_path):
    for (_, folder), name in ((stable_diffusion, "sd"), (deep_floyd, "if")):
        shutil.copytree(folder, old := tmp_path / name)
        data = json.loads((old / "tokenizer/tokenizer.json").read_text())["model"]
        (old / "tokenizer/tokenizer.json").unlink()
        if name == "if":
            shutil.copy(folder / "made/spiece.model", old / "tokenizer")
        else:
            (old / "tokenizer/vocab.json").write_text(json.dumps(data["vocab"]))
            merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in data["merges"]]
            (old / "tokenizer/merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
        torch.testing.assert_close(embed_prompts(old, PROMPTS), embed_prompts(folder, PROMPTS))


@pytest.mark.medium
def test_prompts_are_embedded_once_and_kept_by_encoder_and_text(deep_floyd, tmp_path, monkeypatch):
    _, folder = deep_floyd
    loaded, load = [], transformers.T5EncoderModel.from_pretrained

    def watched(*args, **options):
        made = load(*args, **options)
        loaded.append(weakref.ref(made[0]))
        return made

    monkeypatch.setattr(transformers.T5EncoderModel, "from_pretrained", watched)
    first = embed_prompts(folder, PROMPTS)
    assert len(loaded) == 1
    assert torch.equal(embed_prompts(folder, PROMPTS[::-1]), first.flip(0)) and len(loaded) == 1
    embed_prompts(folder, [*PROMPTS, "the moon"])
    assert len(loaded) == 2
    kept = sorted((tmp_path / "cache/prompts").iterdir())
    assert len(kept) == 3 and all(path.suffix == ".safetensors" for path in kept)
    kept[0].write_bytes(b"damaged")
    embed_prompts(folder, [*PROMPTS, "the moon"])
    assert len(loaded) == 3
    shutil.copytree(folder, other := tmp_path / "other")
    encoder = load(folder / "text_encoder")
    with torch.no_grad():
        encoder.shared.weight.mul_(1.5)
    encoder.save_pretrained(other / "text_encoder")
    assert not torch.equal(embed_prompts(other, PROMPTS), first) and len(loaded) == 4


@pytest.mark.medium
def test_the_text_encoder_is_freed_before_the_network_is_loaded(deep_floyd, monkeypatch):
    _, folder = deep_floyd
    alive, load_text = [], transformers.T5EncoderModel.from_pretrained
    load_unet = diffusers.UNet2DConditionModel.from_pretrained

    def text(*args, **options):
        made = load_text(*args, **options)
        alive.append(weakref.ref(made[0]))
        return made

    def unet(*args, **options):
        gc.collect()
        assert len(alive) == 1 and alive[0]() is None
        return load_unet(*args, **options)

    monkeypatch.setattr(transformers.T5EncoderModel, "from_pretrained", text)
    monkeypatch.setattr(diffusers.UNet2DConditionModel, "from_pretrained", unet)
    assert load_pretrained(str(folder), PROMPTS).num_classes == 2


def test_a_prompt_that_is_too_long_is_refused(stable_diffusion, deep_floyd):
    for _, folder in (stable_diffusion, deep_floyd):
        with pytest.raises(ValueError, match="tokens, and the text encoder reads"):
            embed_prompts(folder, ["a rocket " * 60])


# Names on the hub, and what is refused


def test_a_name_of_the_hub_that_was_downloaded_before(tmp_path, monkeypatch):
    save_unet(tmp_path / "model", diffusers.DDPMScheduler())
    repo = tmp_path / "hub/models--google--tiny"
    shutil.copytree(tmp_path / "model", repo / "snapshots/abc")
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert load_pretrained("google/tiny").x_shape == (3, 8, 8)
    with pytest.raises(ValueError, match=r"google/other was not downloaded before .* or give a folder"):
        load_pretrained("google/other")


def hub_error(kind):
    from huggingface_hub import errors

    return getattr(errors, kind).__new__(getattr(errors, kind))  # without the response that they are made of


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("GatedRepoError", "is gated: accept its licence .* `hf auth login`"),
        ("RepositoryNotFoundError", "There is no model DeepFloyd/IF"),
        ("HfHubHTTPError", "cannot be reached"),
    ],
)
def test_what_the_hub_refuses_is_told_with_the_way_out(monkeypatch, kind, sentence):
    def refuse(*args, **options):
        raise hub_error(kind)

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(ValueError, match=f"{sentence}.*folder"):
        load_pretrained("DeepFloyd/IF")


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def drop_weights(folder):
    (folder / "unet/diffusion_pytorch_model.safetensors").unlink()


def pickle_weights(folder):
    drop_weights(folder)
    torch.save({}, folder / "unet/diffusion_pytorch_model.bin")


def cut_weights(folder):
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def drop_a_tensor(folder):
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    del weights["conv_out.weight"]
    save_file(weights, path, metadata={"format": "pt"})


SCHEDULER, UNET = "scheduler/scheduler_config.json", "unet/config.json"


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (drop_weights, "no weights in safetensors; get"),
        (pickle_weights, r"only diffusion_pytorch_model\.bin, a pickle, which could run code"),
        (cut_weights, "cannot be loaded as a UNet2DModel"),
        (drop_a_tensor, r"lack conv_out\.weight"),
        (lambda folder: shutil.rmtree(folder / "unet"), "holds neither unet/config.json"),
        (lambda folder: shutil.rmtree(folder / "scheduler"), "scheduler_config.json, which says what noise levels"),
        (lambda folder: (folder / UNET).write_text("{"), "cannot be read as JSON"),
        (lambda folder: edit(folder / UNET, _class_name="Transformer2DModel"), "holds Transformer2DModel"),
        (lambda folder: edit(folder / UNET, sample_size=None), "does not say for what size"),
        (lambda folder: edit(folder / UNET, in_channels=7), "takes 7 channels and gives 3"),
        (lambda folder: edit(folder / UNET, class_embed_type="timestep"), "class_embed_type 'timestep'"),
        (lambda folder: edit(folder / SCHEDULER, variance_type="learned_range"), "which is the prediction alone"),
        (lambda folder: edit(folder / SCHEDULER, variance_type="learned"), "variance_type 'learned'"),
        (lambda folder: edit(folder / SCHEDULER, prediction_type="flow"), "prediction_type 'flow'"),
        (lambda folder: edit(folder / SCHEDULER, beta_schedule="odd"), "makes no schedule"),
        (lambda folder: edit(folder / SCHEDULER, _class_name="EDMEulerScheduler"), "has EDMEulerScheduler"),
        (lambda folder: edit(folder / SCHEDULER, _class_name="../x"), "has ../x"),
        (lambda folder: edit(folder / "model_index.json", vqvae=["diffusers", "VQModel"]), "with vqvae"),
    ],
)  # fmt: skip
def test_a_damaged_or_other_model_is_refused_in_a_sentence(tmp_path, damage, sentence):
    save_unet(tmp_path, diffusers.DDPMScheduler())
    damage(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        load_pretrained(str(tmp_path))


@pytest.mark.medium
def test_models_and_arguments_that_do_not_belong_together(tmp_path, stable_diffusion, deep_floyd, deep_floyd_2):
    (_, sd), (_, first), (_, second) = stable_diffusion, deep_floyd, deep_floyd_2
    save_unet(tmp_path / "plain", diffusers.DDPMScheduler())
    plain, first, second, sd = (str(folder) for folder in (tmp_path / "plain", first, second, sd))
    shutil.copytree(first, tmp_path / "mute")
    shutil.rmtree(tmp_path / "mute/text_encoder")
    for sentence, arguments in {
        "reads no text": (plain, ["a cat"]),
        "is empty": (first, ["a cat", " "]),
        "no text_encoder": (str(tmp_path / "mute"), ["a cat"]),
        "give it as stage_2": (second, ["a cat"]),
        "is no upsampler": (first, ["a cat"], "", first),
        "reads no text, and the second stage": (plain, [], "", second),
        "give a first stage of pixels": (sd, [], "", second),
        "without stage_2": (first, ["a cat"], "", None, {"num_steps": 3}),
        "unexpected keyword argument 'num_step'": (first, ["a cat"], "", second, {"num_step": 3}),
        "num_steps is 3.5; give a whole number": (first, ["a cat"], "", second, {"num_steps": 3.5}),
        "noise_level is 1000": (first, ["a cat"], "", second, {"noise_level": 1000}),
        "There is no folder ./nowhere": ("./nowhere",),
    }.items():
        with pytest.raises(ValueError, match=sentence):
            load_pretrained(*arguments)


def test_a_missing_extra_is_told(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "diffusers", None)
    save = tmp_path / "unet"
    save.mkdir()
    (save / "config.json").write_text('{"_class_name": "UNet2DModel", "in_channels": 3}')
    with pytest.raises(ValueError, match=r"install the extra: pip install 'diffusion-lit\[pretrained\]'"):
        load_pretrained(str(tmp_path))


# The command


@pytest.mark.medium
def test_sample_draws_from_a_pretrained_model(lightning, tmp_path, deep_floyd, deep_floyd_2, capsys):
    import numpy as np

    save_unet(tmp_path / "plain", diffusers.DDPMScheduler())
    lightning("sample", "--pretrained", tmp_path / "plain", "--num_samples=2", "--num_steps=2", "--trajectory")
    assert "2 denoiser calls" in capsys.readouterr().out
    assert np.load("runs/samples/samples.npz")["arr_0"].shape == (2, 8, 8, 3)
    text = ["sample", "--pretrained", deep_floyd[1], "--prompt", "a rocket ship", "--prompt=two cats, and: a dog"]
    lightning(*text, "--num_samples=5", "--num_steps=2", "--batch_size=3", "--negative_prompt=the sea")
    saved = np.load("runs/samples/samples.npz")
    assert saved["arr_0"].shape == (5, 8, 8, 3) and saved["labels"].tolist() == [0, 0, 0, 1, 1]
    few = {"num_steps": 2, "noise_level": 40, "cfg_scale": 1.5, "sampler_options": {"variance": "beta"}}
    small = f"--stage_2_options={json.dumps(few)}"
    lightning(*text, "--num_samples=2", "--num_steps=2", "--stage_2", deep_floyd_2[1], small, "--trajectory")
    assert np.load("runs/samples/samples.npz")["arr_0"].shape == (2, 16, 16, 3)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--labels=0"], "has no classes"),
        (["--ckpt_path=x.ckpt"], "Give one model"),
        (["--num_samples=1"], "for 2 prompts"),
    ],
)
def test_the_command_refuses_in_a_sentence(lightning, deep_floyd, capsys, options, sentence):
    with pytest.raises(SystemExit):
        lightning("sample", "--pretrained", deep_floyd[1], "--prompt=the moon", "--prompt=a dog", *options)
    assert sentence in capsys.readouterr().err


def test_options_of_text_models_are_refused_with_a_checkpoint(lightning, capsys):
    for options, sentence in {
        (): "Give one model",
        ("--ckpt_path=x.ckpt", "--prompt=a dog"): "knows classes, not words",
        ("--ckpt_path=x.ckpt", "--stage_2=a/b"): "--stage_2 is for a pretrained text model",
    }.items():
        with pytest.raises(SystemExit):
            lightning("sample", *options)
        assert sentence in capsys.readouterr().err
