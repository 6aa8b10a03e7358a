"""Small real diffusers models with random parameters, by name, each built and captured once per process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

import torch
from diffusers import ControlNetModel, UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from dmqfx.capture import capture
from dmqfx.program import Program

Model = UNet2DModel | UNet2DConditionModel | ControlNetModel


def randomize(model: nn.Module, seed: int = 0) -> None:
    """Give every parameter, gains and biases of norms included, a random value that keeps outputs of order one.

    A fresh model has unit gains and zero biases, and would not notice a rewrite that forgets one.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            elif name.endswith("weight"):
                parameter.copy_(1 + 0.3 * noise)
            else:
                parameter.copy_(0.3 * noise)


def unconditional(**changes: object) -> UNet2DModel:
    """Two levels, self-attention at the lower one."""
    config: dict[str, object] = {
        "sample_size": 16,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attention_head_dim": 8,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    return UNet2DModel(**{**config, **changes})


def conditional(**changes: object) -> UNet2DConditionModel:
    """Two levels, cross-attention at both."""
    config: dict[str, object] = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attention_head_dim": 4,
        "cross_attention_dim": 16,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    }
    return UNet2DConditionModel(**{**config, **changes})


def one_level(**changes: object) -> UNet2DConditionModel:
    """The least that diffusers calls a conditional UNet: for what lies outside the blocks."""
    config: dict[str, object] = {
        "block_out_channels": (16,),
        "down_block_types": ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "mid_block_type": "UNetMidBlock2DCrossAttn",
    }
    return conditional(**{**config, **changes})


def control(**changes: object) -> ControlNetModel:
    """The encoder of `conditional`, with a hint picture four times the latent's size."""
    config: dict[str, object] = {
        "in_channels": 4,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attention_head_dim": 4,
        "cross_attention_dim": 16,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "conditioning_embedding_out_channels": (4, 8, 8),
    }
    return ControlNetModel(**{**config, **changes})


MODELS: Mapping[str, Callable[[], Model]] = {
    "unconditional": unconditional,
    "conditional": conditional,
    "control": control,
}


@cache
def model(name: str) -> Model:
    """The named model with random parameters, in evaluation mode."""
    built = MODELS[name]()
    randomize(built)
    return built.eval().requires_grad_(False)


@cache
def captured(name: str, residuals: bool = False) -> tuple[Model, Program]:
    """The named model and its program."""
    return model(name), capture(model(name), residuals=residuals)


def tiny_unconditional() -> tuple[Model, Program]:
    """A UNet2DModel with self-attention and its program, once per process."""
    return captured("unconditional")


def tiny_conditional() -> tuple[Model, Program]:
    """A UNet2DConditionModel with cross-attention and its program, once per process."""
    return captured("conditional")


def relative(a: Tensor, b: Tensor) -> float:
    """Relative L2 distance of a from b."""
    return float((a - b).norm() / b.norm())
