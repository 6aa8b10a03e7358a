"""A random subset of the output positions of a layer, as rows of a matrix problem (im2col)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Batch", "Batches", "Geometry", "Rows", "sampled"]


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
class Batch:
    """The tensor of a turn on one chunk of calibration rows, the first of which has the number `first`.

    Shapes: real, quantized [B, ...]; timestep [B].
    """

    real: Tensor
    quantized: Tensor
    timestep: Tensor
    first: int = 0


class Batches(Protocol):
    """The tensor of a turn, chunk by chunk; may be gone through several times.

    Where several processes share the rows, it holds those of this one, and `gather` joins what was made of them.

    Units: total is the number of calibration rows, those of other processes included; working in bytes.
    """

    @property
    def total(self) -> int:
        """Calibration rows in all."""

    @property
    def working(self) -> int:
        """Memory that is set apart for computing a chunk."""

    def __iter__(self) -> Iterator[Batch]: ...

    def gather(self, x: Tensor) -> Tensor:
        """From one row or more of every process those of all, in their order.

        Shapes: [n, ...] -> [n of all, ...].
        """

    def reserve(self, nbytes: int, what: str) -> None:
        """Room in memory until the turn ends.

        Raises: CalibrationError if the budget has none.
        """


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

    @property
    def nbytes(self) -> int:
        """Memory of both values."""
        return self.real.nbytes + (0 if self.quantized is self.real else self.quantized.nbytes)


def sampled(batches: Batches, geometry: Geometry, count: int, seed: int, what: str) -> Rows:
    """About `count` output positions, as many of every calibration row; which ones is drawn row by row.

    What is drawn for a calibration row depends on the seed and its number alone, not on how rows are chunked.

    Raises: CalibrationError if the memory budget has no room for them.
    """
    each = max(1, -(-count // batches.total))
    joined = _Joined(each * batches.total)
    for batch in batches:
        part = _of_batch(batch, geometry, each, seed)
        batches.reserve(part.nbytes, what)
        joined.add(part)
    return _gathered(joined.rows(), batches, what)


def _of_batch(batch: Batch, geometry: Geometry, each: int, seed: int) -> Rows:
    size, possible = len(batch.timestep), geometry.positions(batch.real.shape)
    drawn = torch.cat([_drawn(possible, each, seed + batch.first + k) for k in range(size)])
    sample = torch.arange(size).repeat_interleave(len(drawn) // size)
    here, there = sample.to(batch.real.device), drawn.to(batch.real.device)
    real = geometry.gather(batch.real, here, there)
    same = batch.quantized is batch.real
    quantized = real if same else geometry.gather(batch.quantized, here, there)
    return Rows(real, quantized, batch.timestep[here], sample + batch.first, geometry.taps)


def _drawn(possible: int, count: int, seed: int) -> Tensor:
    """Some of the positions, none twice."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(possible, generator=generator)[:count].sort().values


def _gathered(own: Rows, batches: Batches, what: str) -> Rows:
    """The rows of all processes."""
    real, same = batches.gather(own.real), own.quantized is own.real
    if real is own.real:
        return own
    batches.reserve((1 if same else 2) * real.nbytes, what)
    return Rows(
        real,
        real if same else batches.gather(own.quantized),
        batches.gather(own.timestep),
        batches.gather(own.sample),
        own.taps,
    )


class _Joined:
    """Rows one below the other, in memory that is taken once; what stays untouched of it costs nothing.

    `quantized` is `real` as long as that holds for all parts.
    """

    def __init__(self, most: int) -> None:
        self._most, self._count = most, 0
        self._real: Tensor | None = None
        self._quantized: Tensor | None = None
        self._parts: list[tuple[Tensor, Tensor, int]] = []

    def add(self, part: Rows) -> None:
        """Put some more below."""
        start, end = self._count, self._count + len(part.real)
        if self._real is None:
            self._real = part.real.new_empty(self._most, part.real.shape[1])
        if self._quantized is None and part.quantized is not part.real:
            self._quantized = torch.empty_like(self._real)
            self._quantized[:start] = self._real[:start]
        self._real[start:end] = part.real
        if self._quantized is not None:
            self._quantized[start:end] = part.quantized
        self._parts.append((part.timestep, part.sample, part.taps))
        self._count = end

    def rows(self) -> Rows:
        """All that were put here."""
        assert self._real is not None  # there is calibration data
        timesteps, samples, taps = zip(*self._parts, strict=True)
        real = self._real[: self._count]
        quantized = real if self._quantized is None else self._quantized[: self._count]
        return Rows(real, quantized, torch.cat(timesteps), torch.cat(samples), taps[0])
