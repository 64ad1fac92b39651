"""Texts as embeddings: computed once by the model's own text encoder, kept on disk, the encoder freed.

An embedding is a function of the encoder's and the tokenizer's files and of the text; it is kept under the hash of all
three, in safetensors, in the folder `prompts` of the cache (DIFFUSION_LIT_CACHE, or ~/.cache/diffusion-lit).
"""

import gc
import hashlib
import inspect
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_lit.pretrained.files import library, load_part, read_json, refuse_code
from diffusion_lit.storage.atomic import atomic
from diffusion_lit.storage.cache import cache_folder
from diffusion_lit.storage.verified import decode, encode
from diffusion_lit.words import article, first_line

IF_TOKENS = 77  # what IF's encoder was trained to read, whatever its tokenizer allows
VERSION = "v1"


def embed_prompts(model: Path, texts: Sequence[str]) -> Tensor:
    """Embeds texts by a model's text encoder, or finds that it was done before.

    Args:
        model: The model's folder, with `text_encoder` and `tokenizer`.
        texts: The texts, which may be empty.

    Returns:
        Embeddings (N, L, D), float32, one of L tokens for each text.

    Raises:
        ValueError: If encoder or tokenizer cannot be loaded, or a text is longer than the encoder reads.
    """
    identity = text_encoder_hash(model)
    kept = {text: _read(_place(identity, text)) for text in texts}
    found = {text: embedding for text, embedding in kept.items() if embedding is not None}
    missing = [text for text in kept if text not in found]
    if missing:
        for text, embedding in zip(missing, _encode(model, missing), strict=True):
            found[text] = embedding
            place = _place(identity, text)
            with suppress(OSError), atomic(place) as file:  # a cache that cannot be written is done without
                file.write(encode({"embedding": embedding}, {"text": text, "encoder": identity}))
    return torch.stack([found[text] for text in texts])


def text_encoder_hash(model: Path) -> str:
    """What tells a text encoder and its tokenizer from every other.

    Args:
        model: The model's folder.

    Returns:
        The SHA-256 of their files that are read: names and contents.
    """
    whole = hashlib.sha256()
    for part in ("tokenizer", "text_encoder"):
        for path in sorted((model / part).glob("*")):
            if path.suffix in (".json", ".txt", ".model", ".safetensors"):
                with path.open("rb") as file:
                    whole.update(f"{part}/{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()


def _place(identity: str, text: str) -> Path:
    key = hashlib.sha256(repr((VERSION, identity, text)).encode()).hexdigest()
    return cache_folder() / "prompts" / f"{key}.safetensors"


def _read(place: Path) -> Tensor | None:
    """A kept embedding; None where there is none, or a damaged one, which is then recomputed."""
    try:
        return decode(place)[0].get("embedding")
    except (OSError, ValueError):
        return None


def _encode(model: Path, texts: Sequence[str]) -> list[Tensor]:
    """The texts' embeddings (L, D). The encoder lives in this function alone."""
    transformers = library("transformers")
    kind = str((read_json(model / "text_encoder" / "config.json").get("architectures") or ["no name"])[0])
    if kind not in ENCODERS:
        raise ValueError(
            f"{model} has a text encoder of the kind {kind}; those that can be read are {', '.join(ENCODERS)}."
        )
    refuse_code(model / "tokenizer")
    tokenizer_kind, encode = ENCODERS[kind]
    try:
        tokenizer = getattr(transformers, tokenizer_kind).from_pretrained(
            str(model / "tokenizer"), local_files_only=True
        )
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise ValueError(
            f"{model / 'tokenizer'} cannot be loaded as {article(tokenizer_kind)}: {first_line(error)}"
        ) from error
    encoder = load_part(getattr(transformers, kind), model / "text_encoder", dtype=torch.float32)
    with torch.no_grad():
        embeddings = [encode(tokenizer, encoder, text).contiguous() for text in texts]
    del encoder
    gc.collect()
    return embeddings


def _clip(tokenizer: Any, encoder: Any, text: str) -> Tensor:
    """As Stable Diffusion embeds: the encoder's last hidden states of the text, padded to all that it reads."""
    length = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
    _check_length(tokenizer, text, text, length)
    tokens = tokenizer(text, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    mask = tokens.attention_mask if getattr(encoder.config, "use_attention_mask", False) else None
    states: Tensor = encoder(tokens.input_ids, attention_mask=mask)[0]
    return states[0]


def _t5(tokenizer: Any, encoder: Any, text: str) -> Tensor:
    """As DeepFloyd IF embeds, by its own pipeline: the text cleaned, 77 tokens, the padding masked."""
    for needed in ("bs4", "ftfy"):
        library(needed)
    parts = inspect.signature(library("diffusers").IFPipeline.__init__).parameters
    nothing = {name: None for name in parts if name not in ("self", "requires_safety_checker")}
    given = {**nothing, "tokenizer": tokenizer, "text_encoder": encoder}
    pipeline = library("diffusers").IFPipeline(**given, requires_safety_checker=False)
    (cleaned,) = pipeline._text_preprocessing(text, clean_caption=True)
    _check_length(tokenizer, text, cleaned, IF_TOKENS)
    states: Tensor = pipeline.encode_prompt(text, do_classifier_free_guidance=False, clean_caption=True)[0]
    return states[0]


def _check_length(tokenizer: Any, text: str, read: str, longest: int) -> None:
    length = len(tokenizer(read, truncation=False, verbose=False).input_ids)
    if length > longest:
        raise ValueError(
            f"The prompt {text[:40]!r}... has {length} tokens, and the text encoder reads {longest}; shorten it."
        )


ENCODERS: dict[str, tuple[str, Callable[[Any, Any, str], Tensor]]] = {
    "CLIPTextModel": ("CLIPTokenizer", _clip),
    "T5EncoderModel": ("T5Tokenizer", _t5),
}
