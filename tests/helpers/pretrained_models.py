"""Tiny diffusers models with random weights in the official layouts: U-Net, Stable Diffusion, both stages of IF."""

import diffusers
import sentencepiece
import torch
import transformers

BLOCKS = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
WORDS = ["a rocket ship", "a painting of a red bird by the sea", "the moon over old houses", "two cats and a dog"]
STEPS = 8


def loud(net, factor=3.0):
    """Predictions large enough that thresholds and differences matter."""
    with torch.no_grad():
        net.conv_out.weight.mul_(factor)
        net.conv_out.bias.add_(0.1)
    return net.eval()


def unet_2d(channels=3, out_channels=None, seed=0, **options):
    """A UNet2DModel of 8x8 images, like google/ddpm-cifar10-32's."""
    torch.manual_seed(seed)
    return loud(
        diffusers.UNet2DModel(
            sample_size=8, in_channels=channels, out_channels=out_channels or channels, **BLOCKS,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            **options,
        )
    )  # fmt: skip


def save_unet(folder, scheduler, net=None):
    """U-Net and scheduler as their pipeline saves them; gives the pipeline."""
    kind = diffusers.DDIMPipeline if isinstance(scheduler, diffusers.DDIMScheduler) else diffusers.DDPMPipeline
    pipeline = kind(unet=net or unet_2d(), scheduler=scheduler)
    pipeline.save_pretrained(folder)
    return pipeline


def clip_tokenizer(folder):
    """CLIP's tokenizer on a few merges."""
    folder.mkdir(parents=True)
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    merges = ["r o", "c k", "ro ck", "s h"]
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), "ro", "ck", "rock", "sh"]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    tokenizer = transformers.CLIPTokenizer(
        vocab={word: index for index, word in enumerate(vocabulary)},
        merges=[tuple(merge.split()) for merge in merges],
        model_max_length=40,
    )
    tokenizer.save_pretrained(folder)
    return tokenizer, len(vocabulary)


def save_stable_diffusion(folder, scheduler):
    """Stable Diffusion's layout: latents 4x8x8 of images 3x16x16, a CLIP text encoder; gives the pipeline."""
    torch.manual_seed(0)
    tokenizer, size = clip_tokenizer(folder / "made")
    config = transformers.CLIPTextConfig(
        vocab_size=size, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=40, bos_token_id=size - 2, eos_token_id=size - 1,
    )  # fmt: skip
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, **BLOCKS, cross_attention_dim=16, attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(8, 8), layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4,
        scaling_factor=0.3,
    )  # fmt: skip
    pipeline = diffusers.StableDiffusionPipeline(
        vae=vae.eval(), text_encoder=transformers.CLIPTextModel(config).eval(), tokenizer=tokenizer, unet=loud(unet),
        scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    return pipeline


def t5_tokenizer(folder):
    """T5's tokenizer from a sentencepiece model, the one file that IF has."""
    folder.mkdir(parents=True)
    (folder / "words.txt").write_text("\n".join(WORDS * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "words.txt"), model_prefix=str(folder / "spiece"), vocab_size=60, hard_vocab_limit=False,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    return transformers.T5Tokenizer.from_pretrained(folder)


def if_unet(channels=3, size=8, out_channels=6, seed=0, **options):
    """IF's kind of U-Net."""
    torch.manual_seed(seed)
    unet = diffusers.UNet2DConditionModel(
        sample_size=size, in_channels=channels, out_channels=out_channels, **BLOCKS, cross_attention_dim=16,
        encoder_hid_dim=16, attention_head_dim=4, act_fn="gelu", resnet_time_scale_shift="scale_shift",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        addition_embed_type="text", addition_embed_type_num_heads=2, **options,
    )  # fmt: skip
    return loud(unet, 1.5)


def if_scheduler(**options):
    """IF's own scheduler: learned variance, dynamic threshold, cosine betas."""
    given = {
        "beta_schedule": "squaredcos_cap_v2", "variance_type": "learned_range", "thresholding": True,
        "dynamic_thresholding_ratio": 0.95, "sample_max_value": 1.5,
    }  # fmt: skip
    return diffusers.DDPMScheduler(**(given | options))


def save_if(folder, scheduler=None):
    """IF's first stage of 8x8 images; gives the pipeline."""
    torch.manual_seed(0)
    tokenizer = t5_tokenizer(folder / "made")
    config = transformers.T5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2, dropout_rate=0.0
    )
    pipeline = diffusers.IFPipeline(
        tokenizer=tokenizer, text_encoder=transformers.T5EncoderModel(config).eval(), unet=if_unet(),
        scheduler=scheduler or if_scheduler(), safety_checker=None, feature_extractor=None, watermarker=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    return pipeline


def save_if_2(folder, scheduler=None):
    """IF's second stage of 16x16 images, without text encoder; gives the pipeline."""
    pipeline = diffusers.IFSuperResolutionPipeline(
        tokenizer=None, text_encoder=None,
        unet=if_unet(channels=6, size=16, seed=1, class_embed_type="timestep"),
        scheduler=scheduler or if_scheduler(sample_max_value=1.0), safety_checker=None,
        image_noising_scheduler=diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"), feature_extractor=None,
        watermarker=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    return pipeline
