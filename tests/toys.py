"""A UNet small enough to read whole, with one of everything that a pass can get wrong."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor, nn
from torch.export import Dim, export
from torch.nn import functional as F

from dmqfx.calibration.calibration import Calibration
from dmqfx.calibration.rows import Column, Rows
from dmqfx.checking.shrink import randomize
from dmqfx.frontend import exported
from dmqfx.graph.inputs import Input, InputSpec
from dmqfx.graph.modules import build, propagate
from dmqfx.graph.program import Program

WIDTH = 8


class TimeEmbedding(nn.Module):
    """Sine and cosine of the timestep, and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(WIDTH, 12), nn.Linear(12, 12)

    def forward(self, timestep: Tensor) -> Tensor:
        half = WIDTH // 2
        frequency = torch.exp(-math.log(1000) * torch.arange(half, dtype=torch.float32) / half)
        angle = timestep[:, None].float().double() * frequency[None, :]
        waves = torch.cat([angle.sin(), angle.cos()], dim=-1).float()
        return self.linear_2(F.silu(self.linear_1(waves)))


class Resnet(nn.Module):
    """Two normed convolutions, the second grouped and dilated, around the timestep's projection."""

    def __init__(self, channels: int, out: int, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor
        self.norm1, self.conv1 = nn.GroupNorm(2, channels, eps=1e-2), nn.Conv2d(channels, out, 3, padding=1)
        self.time_emb_proj = nn.Linear(12, out)
        self.norm2 = nn.GroupNorm(4, out)
        self.dropout = nn.Dropout(0.5)
        self.conv2 = nn.Conv2d(out, out, 3, padding=2, dilation=2, groups=2)
        self.conv_shortcut = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.time_emb_proj(F.silu(embedding))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return (self.conv_shortcut(x) + h) / self.factor


class Transformer(nn.Module):
    """Self-attention with two heads, then a gated feed-forward layer."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels, bias=k == 2) for k in range(3))
        self.to_out = nn.Linear(channels, channels)
        self.proj, self.out = nn.Linear(channels, 4 * channels), nn.Linear(2 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        h = x.permute(0, 2, 3, 1).reshape(batch, height * width, channels)
        n = self.norm1(h)
        q, k, v = (
            to(n).view(batch, -1, 2, channels // 2).transpose(1, 2)
            for to in (self.to_q, self.to_k, self.to_v)
        )
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, -1, channels)
        h = h + self.to_out(attended.to(h.dtype))
        linear, gate = self.proj(self.norm2(h)).chunk(2, dim=-1)
        h = h + self.out(linear * F.gelu(gate))
        return x + h.reshape(batch, height, width, channels).permute(0, 3, 1, 2).contiguous()


class Toy(nn.Module):
    """Two levels, one long skip from each, attention at the lower one."""

    def __init__(self) -> None:
        super().__init__()
        self.time_embedding = TimeEmbedding()
        self.conv_in = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.down = Resnet(WIDTH, WIDTH)
        self.downsample = nn.Conv2d(WIDTH, WIDTH, 3, stride=2, padding=1)
        self.mid = Transformer(WIDTH)
        self.upsample = nn.Conv2d(WIDTH, 12, 3, padding=1)
        self.up = nn.ModuleList([Resnet(12 + WIDTH, 12), Resnet(12 + WIDTH, WIDTH, factor=2.0)])
        self.norm_out, self.conv_out = nn.GroupNorm(2, WIDTH), nn.Conv2d(WIDTH, 3, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        embedding = self.time_embedding(timestep)
        first = self.conv_in(sample)
        second = self.down(first, embedding)
        h = self.mid(self.downsample(second))
        h = self.upsample(F.interpolate(h, scale_factor=2.0, mode="nearest"))
        h = self.up[0](torch.cat([h, second], dim=1), embedding)
        h = self.up[1](torch.cat([h, first], dim=1), embedding)
        return self.conv_out(F.silu(self.norm_out(h)))


class Prompted(nn.Module):
    """One level that looks at a context: what depends on the timestep, or on the context, and on no sample."""

    def __init__(self) -> None:
        super().__init__()
        self.time_embedding = TimeEmbedding()
        self.conv_in, self.down = nn.Conv2d(3, WIDTH, 3, padding=1), Resnet(WIDTH, WIDTH)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, WIDTH) for width in (WIDTH, 6, 6))
        self.to_out, self.conv_out = nn.Linear(WIDTH, WIDTH), nn.Conv2d(WIDTH, 3, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        x = self.down(self.conv_in(sample), self.time_embedding(timestep))
        batch, channels, height, width = x.shape
        context = encoder_hidden_states
        q, k, v = (
            to(n).view(batch, -1, 2, channels // 2).transpose(1, 2)
            for to, n in ((self.to_q, x.flatten(2).mT), (self.to_k, context), (self.to_v, context))
        )
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, -1, channels)
        return self.conv_out(x + self.to_out(attended).mT.reshape(batch, channels, height, width))


class Wrapper(nn.Module):
    """Gives the toy a name, as capture does, so that addresses begin inside it."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        found: Tensor = self.unet(sample, timestep)
        return found


class PromptedWrapper(Wrapper):
    """The same for one that takes a context."""

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:  # type: ignore[override]  # one input more
        found: Tensor = self.unet(sample, timestep, encoder_hidden_states)
        return found


SPEC = InputSpec(
    "Toy",
    (Input("sample", ("B", 3, "H", "W")), Input("timestep", ("B",), "timestep")),
    {"B": 2, "H": 8, "W": 8},
    multiple_of=2,
)


PROMPTED = replace(
    SPEC,
    inputs=(*SPEC.inputs, Input("encoder_hidden_states", ("B", "T", 6))),
    sizes={**SPEC.sizes, "T": 4},
)


@cache
def toy() -> Program:
    """The toy with random parameters as a program, once per process."""
    return program_of_model(Wrapper(Toy()), SPEC, torch.zeros(3, 3, 8, 12), torch.zeros(3))


@cache
def prompted() -> Program:
    """The toy that takes a context."""
    examples = torch.zeros(3, 3, 8, 12), torch.zeros(3), torch.zeros(3, 5, 6)
    return program_of_model(PromptedWrapper(Prompted()), PROMPTED, *examples)


def program_of_model(model: Wrapper, spec: InputSpec, *examples: Tensor) -> Program:
    """A model with random parameters as a program, of any batch, context and even size."""
    model.eval().requires_grad_(False)
    randomize(model.unet)
    free = (
        {0: Dim.DYNAMIC, 2: Dim("h", min=2, max=512) * 2, 3: Dim("w", min=2, max=512) * 2},
        {0: Dim.DYNAMIC},
        {0: Dim.DYNAMIC, 1: Dim.DYNAMIC},
    )[: len(examples)]
    with torch.no_grad():
        found = export(model, examples, dynamic_shapes=free, strict=False)
    graph, weights = exported.read(found, tuple(i.name for i in spec.inputs), "unet.")
    gm = build(graph, weights)
    propagate(gm, spec)
    return Program(gm, spec)


def rows(count: int = 12, seed: int = 0, spec: InputSpec = SPEC, prompts: int = 0) -> Calibration:
    """Calibration rows of noise at even timesteps, for the toy or another program; row by row with one of the prompts."""
    generator = torch.Generator().manual_seed(seed)
    inputs = spec.draw(generator, B=count)
    inputs["timestep"] = torch.linspace(999, 0, count)
    each = torch.arange(count)
    columns = {name: Column(value, each) for name, value in inputs.items()}
    if prompts:
        columns["encoder_hidden_states"] = Column(inputs["encoder_hidden_states"][:prompts], each % prompts)
    return Calibration((Rows(columns, torch.zeros_like(each), each),))
