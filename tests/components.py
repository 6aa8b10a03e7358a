"""Tiny random parts of diffusers pipelines, made without a network."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from models import randomize
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer


def tokenizer(folder: Path) -> CLIPTokenizer:
    """A tokenizer that knows the letters."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: k for k, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=8)


def text_encoder(width: int = 16, *, projection: int | None = None) -> CLIPTextModel:
    """One layer of text encoding."""
    config = CLIPTextConfig(
        vocab_size=54, hidden_size=width, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8, projection_dim=projection or width, bos_token_id=52, eos_token_id=53,
        pad_token_id=53,
    )  # fmt: skip
    torch.manual_seed(1)
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


_WAYS = {"down": "Encoder", "up": "Decoder"}


@cache
def vae(levels: int = 1) -> AutoencoderKL:
    """Four latent channels; pictures are 2 ** (levels - 1) times their size."""
    blocks = {f"{way}_block_types": (f"{way.title()}{kind}Block2D",) * levels for way, kind in _WAYS.items()}
    model = AutoencoderKL(block_out_channels=(8,) * levels, latent_channels=4, norm_num_groups=2, **blocks)
    randomize(model)
    return model.eval()
