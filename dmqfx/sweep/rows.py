"""A random subset of the output positions of a layer, as rows of a matrix problem (im2col)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Geometry", "Rows"]


@dataclass(frozen=True)
class Geometry:
    """How a layer's window moves over its input: all that decides which numbers an output position reads.

    A linear layer reads the last axis; a convolution `kernel` taps of each channel.
    """

    kernel: tuple[int, int] | None = None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    @property
    def taps(self) -> int:
        """Columns per input channel."""
        return 1 if self.kernel is None else self.kernel[0] * self.kernel[1]

    def positions(self, shape: Sequence[int]) -> int:
        """Output positions of one row of an input of this shape (batch first)."""
        if self.kernel is None:
            return int(torch.Size(shape[1:-1]).numel())
        high, wide = (self._length(shape[2 + k], k) for k in (0, 1))
        return high * wide

    def gather(self, x: Tensor, sample: Tensor, position: Tensor) -> Tensor:
        """The numbers that some output positions read.

        Shapes: x [B, ..., C] or [B, C, H, W]; sample, position int64 [n]; returns [n, C * taps], the taps of a
        channel side by side, as in weight.flatten(1).
        """
        if self.kernel is None:
            return x.reshape(x.shape[0], -1, x.shape[-1])[sample, position]
        wide = self._length(x.shape[3], 1)
        row = (position // wide) * self.stride[0]
        column = (position % wide) * self.stride[1]
        (up, left), (high, across) = self.padding, self.kernel
        padded = F.pad(x, (left, left, up, up))
        taps_y = row[:, None] + torch.arange(high, device=x.device) * self.dilation[0]
        taps_x = column[:, None] + torch.arange(across, device=x.device) * self.dilation[1]
        found = padded[sample[:, None, None], :, taps_y[:, :, None], taps_x[:, None, :]]  # [n, kh, kw, C]
        return found.permute(0, 3, 1, 2).reshape(len(sample), -1)

    def _length(self, size: int, k: int) -> int:
        assert self.kernel is not None
        reach = self.dilation[k] * (self.kernel[k] - 1) + 1
        return (size + 2 * self.padding[k] - reach) // self.stride[k] + 1


@dataclass(frozen=True, eq=False)
class Rows:
    """Sampled rows of a layer's input.

    Shapes: real, quantized [N, C * taps]; timestep [N]; sample int64 [N] (which calibration row each is from).
    """

    real: Tensor
    quantized: Tensor
    timestep: Tensor
    sample: Tensor
    taps: int = 1
