"""What a native layer's results become: codes, behind an activation; asked for where quantize alone reads them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dmqfx.runtime.kernels import codes
from dmqfx.runtime.kernels.native import Coding, Layer

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
        scale, zero_point = self.scale.contiguous(), self.zero_point.int().contiguous()
        channels = self.channels(layer.groups * layer.out_channels)
        codes.check_grid(scale, zero_point, channels, None if group is None else layer.batch, layer.batch)
        made = Coding(
            batch=layer.batch, channels=channels,
            activation=codes.ACTIVATIONS.index(self.activation), least=self.qmin, greatest=self.qmax,
            scale_channels=scale.shape[1], zero_point_channels=zero_point.shape[1], timestep_groups=scale.shape[0],
            scales=scale.data_ptr(), zero_points=zero_point.data_ptr(), codes=out.data_ptr(),
        )  # fmt: skip
        if group is not None:
            made.group = layer.group
        made.kept = (scale, zero_point)
        return made
