"""What a program takes: named tensors with symbolic sizes, and random ones to try it on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Dim: TypeAlias = int | str


@dataclass(frozen=True)
class Input:
    """One tensor input of a program; `name` is its placeholder.

    Shapes: dims of ints and names: "B" batch, "H", "W" (also "H/4" = ceil(H / 4), "H*8"), "T" context length.
    """

    name: str
    dims: tuple[Dim, ...]
    kind: Literal["normal", "timestep", "label", "size", "residual"] = "normal"
    dtype: torch.dtype = torch.float32
    high: int = 0

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Concrete sizes, e.g. of {"B": 2, "H": 64, "W": 64, "T": 77}."""
        return tuple(_size(dim, sizes) for dim in self.dims)

    @property
    def optional(self) -> bool:
        """Whether a call may leave it out: a missing residual is a zero that broadcasts."""
        return self.kind == "residual"


@dataclass(frozen=True)
class InputSpec:
    """What a program takes and returns, and the example sizes its shapes are shown at.

    `unread` names arguments that a call may give and that change nothing, as in diffusers.

    Units: height and width must be multiples of `multiple_of` (1: any size).
    """

    root: str
    inputs: tuple[Input, ...]
    sizes: Mapping[str, int]
    multiple_of: int = 1
    outputs: tuple[str, ...] = ("sample",)
    unread: tuple[str, ...] = ()

    def draw(
        self,
        generator: torch.Generator,
        *,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        **sizes: int,
    ) -> dict[str, Tensor]:
        """Random inputs of the given sizes (default: the example's): noise, distinct timesteps, legal labels."""
        wanted = {**self.sizes, **sizes}
        return {i.name: _draw(i, i.shape(wanted), generator, dtype).to(device) for i in self.inputs}


def _size(dim: Dim, sizes: Mapping[str, int]) -> int:
    if isinstance(dim, int):
        return dim
    if "*" in dim:
        name, _, factor = dim.partition("*")
        return sizes[name] * int(factor)
    name, _, divisor = dim.partition("/")
    return -(-sizes[name] // int(divisor or 1))


def _draw(i: Input, shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    if i.kind == "timestep":
        return (torch.rand(shape, generator=generator, dtype=torch.float64) * 999).to(dtype)
    if i.kind == "label":
        return torch.randint(0, max(i.high, 1), shape, generator=generator)
    if i.kind == "size":
        return torch.randint(0, 1024, shape, generator=generator).to(dtype)
    scale = 0.1 if i.kind == "residual" else 1.0
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)
