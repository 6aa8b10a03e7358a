"""Arithmetic of quantization: what a scale is and how a number becomes a code. Knows no graph and no policy file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Grid = Literal["symmetric", "affine"]
Per = Literal["tensor", "channel"]
RangeMethod = Literal["minmax", "mse"]


@dataclass(frozen=True)
class QuantSpec:
    """How one tensor is asked to be quantized.

    Shapes: boundaries is sorted and has G - 1 entries for G timestep groups; () is the static case.
    Units: bits 2..8; boundaries in timesteps as the UNet receives them.
    """

    bits: int
    grid: Grid = "affine"
    per: Per = "tensor"
    range: RangeMethod = "minmax"
    boundaries: tuple[float, ...] = ()

    def __str__(self) -> str:
        groups = f" x{len(self.boundaries) + 1}" if self.boundaries else ""
        return f"{self.bits} bit {self.grid} per {self.per} {self.range}{groups}"


@dataclass(frozen=True, eq=False)
class QParams:
    """real = (code - zero_point) * scale, with code in [qmin, qmax].

    Shapes: scale, zero_point [G, C]: G timestep groups (1 = static), C channels on `axis` (1 = per tensor).
    """

    scale: Tensor
    zero_point: Tensor
    qmin: int
    qmax: int
    axis: int | None
    boundaries: tuple[float, ...] = ()
