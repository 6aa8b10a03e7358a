"""What a native layer's results become: codes, behind an activation; asked for where quantize alone reads them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dmqfx.runtime.kernels import codes
from dmqfx.runtime.kernels.native import Coding, Layer
from dmqfx.runtime.kernels.recipes import Recipe, check_groups, prepare

__all__ = ["Coded"]

_HALVES = 32  # output channels, of which GEGLU takes halves of whole blocks


@dataclass(frozen=True, eq=False)
class Coded:
    """The grid of the codes and the activation before it; see `codes.quantize`.

    Shapes: scale, zero_point [G, 1] or [G, channels].
    """

    scale: Tensor
    zero_point: Tensor
    qmin: int
    qmax: int
    activation: str = "none"

    @property
    def dtype(self) -> torch.dtype:
        """Of the codes."""
        return torch.int8 if self.qmin < 0 else torch.uint8

    def channels(self, out: int) -> int:
        """Codes of so many results."""
        return out // 2 if self.activation == "geglu" else out

    def fits(self, out: int) -> bool:
        """Whether the kernel can make codes of so many output channels."""
        return self.scale.dtype == torch.float32 and (self.activation != "geglu" or out % _HALVES == 0)

    def of(self, real: Tensor, group: Tensor | None, axis: int) -> Tensor:
        """The codes of real numbers whose channels lie on an axis."""
        grid = (self.scale, self.zero_point, group, axis % real.dim(), self.qmin, self.qmax)
        return codes.quantize(real, *grid, activation=self.activation)

    def coding(self, layer: Layer, group: Tensor | None, out: Tensor) -> Coding:
        """For the kernel; it points into these tensors, which have to outlive it."""
        channels = layer.groups * layer.out_channels
        recipe = Recipe(
            self.scale, self.zero_point, None, None, 2, 1, channels, self.qmin, self.qmax, activation=self.activation
        )  # fmt: skip
        made = prepare(recipe).coding()
        check_groups(group, len(self.scale), layer.batch)
        made.batch, made.codes = layer.batch, out.data_ptr()
        if group is not None:
            made.group = layer.group
        return made
