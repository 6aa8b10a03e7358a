"""Configurations at their real size, with random parameters: nothing is downloaded."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel


def sd15(seed: int = 0) -> UNet2DConditionModel:
    """The UNet configuration of Stable Diffusion 1.5: 860 M parameters, 64 x 64 latents, 77 x 768 context."""
    return _sd15(seed, 64, (320, 640, 1280, 1280))


def sd15_narrow(seed: int = 0) -> UNet2DConditionModel:
    """The same blocks, a fifth to a tenth as wide, for latents of half the sides."""
    return _sd15(seed, 32, (64, 128, 128, 128))


def _sd15(seed: int, size: int, widths: tuple[int, ...]) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=size,
        in_channels=4,
        out_channels=4,
        layers_per_block=2,
        block_out_channels=widths,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=768,
        attention_head_dim=8,
    ).eval()
