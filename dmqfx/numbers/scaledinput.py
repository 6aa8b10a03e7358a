"""An activation that is to be scaled, and rounding to codes with gradients through ranges and steps."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dmqfx.numbers.fitting import PERCENT, Ends, RowExtremes, Sample, percentile, search
from dmqfx.numbers.quant import QuantSpec, qrange

__all__ = ["Input", "grid_between", "ratio", "round_through"]

_REACH = 2.0**20


@dataclass(frozen=True, eq=False)
class Input:
    """A tensor that is to be scaled.

    Shapes: values [N, C * taps], taps of a channel side by side; group int64 [N], the row's timestep group of
    the spec; low, high [G, C], its extremes; `rows` those of each calibration row, for ranges that are averages of
    them; finer [G, C], by what each channel's step is multiplied: the power of two of a shift, if there is one.
    """

    values: Tensor
    group: Tensor
    low: Tensor
    high: Tensor
    spec: QuantSpec
    taps: int = 1
    rows: RowExtremes | None = None
    finer: Tensor | None = None

    def in_reach(self) -> Input:
        """The same in another unit, a power of two, where squares of errors would be beyond the numbers that there are.

        Scales and errors are in that unit; a gamma is the same one.
        """
        peak = float(torch.maximum(self.low.abs(), self.high.abs()).amax())
        if not 0 < peak < math.inf or _REACH**-1 < peak < _REACH:
            return self
        unit = 2.0 ** round(math.log2(peak))
        rows = self.rows and replace(self.rows, low=self.rows.low / unit, high=self.rows.high / unit)
        return replace(self, values=self.values / unit, low=self.low / unit, high=self.high / unit, rows=rows)

    def columns(self, gamma: Tensor) -> Tensor:
        """gamma for every column."""
        return gamma.repeat_interleave(self.taps)

    def ends(self, gamma: Tensor) -> Ends:
        """The extremes of x / gamma, [G, 1]; or [G, C] if the spec is per channel."""
        low, high = (self.low / gamma).clamp(max=0), (self.high / gamma).clamp(min=0)
        if self.spec.per == "channel":
            return low, high
        whole = low.amin(1), high.amax(1)
        if self.spec.range == "ema" and self.rows is not None:
            averaged = self.rows.average(whole, gamma)
            whole = averaged[0].clamp(max=0), averaged[1].clamp(min=0)
        return whole[0][:, None], whole[1][:, None]

    def covered(self, gamma: Tensor, felt: Tensor) -> tuple[Tensor, Tensor]:
        """What part of these ends the grid covers, where the plan has them searched or cut off.

        Shapes: felt [C * taps] of x / gamma; result as the ends.
        """
        low, high = self.ends(gamma)
        if self.spec.range not in ("mse", "percentile"):
            return torch.ones_like(low), torch.ones_like(high)
        sample = Sample(self.values / self.columns(gamma), self.group, felt)
        ends = low[:, 0], high[:, 0]
        found = (
            search(ends, sample, self.spec) if self.spec.range == "mse" else percentile(ends, sample, PERCENT)
        )
        return ratio(found[0][:, None], low), ratio(found[1][:, None], high)

    def grid(self, gamma: Tensor, shares: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Scale [G, C or 1] and zero point of x / gamma, with gradients; `shares` of the ends are covered."""
        low, high = self.ends(gamma)
        if shares is not None:
            # 0 stays inside, as in params_from_range
            low, high = (low * shares[0]).clamp(max=0), (high * shares[1]).clamp(min=0)
        scale, zero = grid_between(low, high, self.spec)
        return scale if self.finer is None else scale * self.finer.to(scale), zero

    def rounded(self, gamma: Tensor, shares: tuple[Tensor, Tensor], rows: Tensor | slice) -> Tensor:
        """Some rows of x / gamma as they are deployed, with gradients; `shares` of the ends are covered.

        Shapes: [n, C * taps].
        """
        wide = (
            each.repeat_interleave(self.taps, 1) if each.shape[1] > 1 else each
            for each in self.grid(gamma, shares)
        )
        scale, zero = (each[self.group[rows]] for each in wide)
        return round_through(self.values[rows] / self.columns(gamma), scale, zero, self.spec)


def grid_between(low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Scale and zero point of params_from_range, with gradients."""
    qmin, qmax = qrange(spec)
    tiny = torch.finfo(low.dtype).tiny
    if spec.grid == "symmetric":
        scale = torch.maximum(high / qmax, low / qmin).clamp(min=tiny)
        return scale, torch.zeros_like(scale)
    scale = (high / (qmax - qmin) - low / (qmax - qmin)).clamp(min=tiny)
    return scale, _straight(qmin - low / scale).clamp(qmin, qmax)


def round_through(x: Tensor, scale: Tensor, zero: Tensor, spec: QuantSpec) -> Tensor:
    """What the codes of x stand for, with gradients as if nothing were rounded."""
    codes = (_straight(x / scale) + zero).clamp(*qrange(spec))
    return (codes - zero) * scale


def _straight(x: Tensor) -> Tensor:
    """Rounded forward, untouched backward."""
    return x + (x.round() - x).detach()


def ratio(part: Tensor, whole: Tensor) -> Tensor:
    """What part of a whole it is; 1 of nothing."""
    return (part / whole.where(whole != 0, 1.0)).where(whole != 0, 1.0)
