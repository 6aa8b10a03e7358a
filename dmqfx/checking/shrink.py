"""shrunk: the same UNet with few channels and random parameters, for checks too costly on the real one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

import torch
from diffusers import UNet2DModel
from torch import nn

from dmqfx.frontend.signature import SUPPORTED, UNet

__all__ = ["randomize", "shrunk"]

_GROUPS: Final = 4
# Widths of the narrowest level, tried in turn: some blocks have norm groups of their own, up to 32.
_WIDTHS: Final = (8, 16, 32)
_NARROWED: Final[Mapping[str, int]] = {
    "cross_attention_dim": 32,
    "encoder_hid_dim": 24,
    "addition_time_embed_dim": 8,
    "addition_embed_type_num_heads": 4,
    "time_cond_proj_dim": 12,
}


def shrunk(unet: UNet, *, seed: int = 0) -> UNet:
    """A UNet of the same blocks, addresses and inputs with a few channels per level and random parameters.

    Gains and biases of norms are random too: in a fresh model a rewrite that forgets one does not show.

    Raises: ValueError if no narrow UNet can be built from the configuration.
    Example:
        >>> wide = UNet2DModel(block_out_channels=(224, 448, 672, 896))
        >>> shrunk(wide).config.block_out_channels
        (8, 16, 24, 32)
    """
    cls, config = next(c for c in SUPPORTED if isinstance(unet, c)), dict(unet.config)
    kept = {key: value for key, value in config.items() if not key.startswith("_")}
    problem: Exception | None = None
    for width in _WIDTHS:
        try:
            small = cls.from_config({**kept, **_narrow(unet, config, width)})
        except (ValueError, RuntimeError, TypeError) as error:
            problem = error
            continue
        randomize(small, seed)
        return small.eval().requires_grad_(False)
    raise ValueError(f"no narrow {cls.__name__} can be built from this configuration: {problem}") from problem


def randomize(model: nn.Module, seed: int = 0) -> None:
    """Give every parameter, norms' included, a random value that keeps outputs of order one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(float(name.endswith("weight")) + 0.3 * noise)


def _narrow(unet: UNet, config: Mapping[str, object], width: int) -> dict[str, object]:
    """What changes in the configuration; levels keep the ratio of their widths, up to a factor of four."""
    widths = [int(each) for each in unet.config.block_out_channels]
    narrow = tuple(width * min(4, math.ceil(each / min(widths))) for each in widths)
    changed: dict[str, object] = {"block_out_channels": narrow}
    for key, few in _NARROWED.items():
        if config.get(key) is not None:
            changed[key] = _same_form(config[key], few)
    for key in ("norm_num_groups", "attn_norm_num_groups"):
        if config.get(key) is not None:
            changed[key] = _GROUPS
    if isinstance(size := config.get("sample_size"), int):
        changed["sample_size"] = min(size, 4 * 2 ** (len(widths) - 1))
    changed.update(_heads(unet, config))
    changed.update(_pooled(config))
    return changed


def _heads(unet: UNet, config: Mapping[str, object]) -> dict[str, object]:
    """Two heads everywhere; diffusers calls their number `attention_head_dim`, but not in UNet2DModel."""
    if isinstance(unet, UNet2DModel):
        return {"attention_head_dim": 4} if config.get("attention_head_dim") is not None else {}
    keys = [key for key in ("attention_head_dim", "num_attention_heads") if config.get(key) is not None]
    return {key: _same_form(config[key], 2) for key in keys}


def _pooled(config: Mapping[str, object]) -> dict[str, object]:
    """Widths of what is added to the time embedding."""
    total = config.get("projection_class_embeddings_input_dim")
    if not isinstance(total, int):
        return {}
    if config.get("addition_embed_type") != "text_time":
        return {"projection_class_embeddings_input_dim": 12}
    each = config.get("addition_time_embed_dim")
    ids = 5 if isinstance(each, int) and total - 5 * each == 1280 else 6
    return {"projection_class_embeddings_input_dim": ids * _NARROWED["addition_time_embed_dim"] + 20}


def _same_form(value: object, size: int) -> object:
    """The size as a number, or in the nested tuple in which it was given."""
    if isinstance(value, (list, tuple)):
        return tuple(_same_form(each, size) for each in value)
    return size
