"""Which range of an activation its codes should cover, in every timestep group, judged by sampled values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from dmqfx.numbers.quant import QuantSpec, fake_quantize, params_from_range

__all__ = ["MOMENTUM", "PERCENT", "Ends", "RowExtremes", "Sample", "percentile", "search"]

PERCENT, MOMENTUM = 99.99, 0.95
"""What lies inside of a range by percentile; what stays of an average of extremes when a row comes."""

_BINS = 1024  # 16 of them in a step of 6 bits over the whole range
_FACTORS, _SMALLEST = 24, 0.1  # candidates for each end, in equal ratios down to this share of it
_VALUES, _TRIED = 2**22, 2048  # values looked at together; rows that a found range is tried on

Ends = tuple[Tensor, Tensor]
"""The lower and the upper end of the range of each timestep group, both [G]."""


@dataclass(frozen=True, eq=False)
class Sample:
    """Values of an activation.

    Shapes: values [N, K]; group int64 [N]; felt [K], how much the square of an error in a column weighs.
    """

    values: Tensor
    group: Tensor
    felt: Tensor

    def histogram(self, low: Tensor, high: Tensor) -> Tensor:
        """What weighs in each bin between the ends.

        Shapes: low, high [G]; float64 [G, _BINS].
        """
        total = torch.zeros(len(low) * _BINS, dtype=torch.float64, device=low.device)
        for values, group in self._parts():
            start, width = low.to(values)[group], (high - low).to(values)[group]
            place = (values - start[:, None]) * (_BINS / width.where(width > 0, 1.0))[:, None]
            index = place.long().clamp_(0, _BINS - 1).add_(group[:, None] * _BINS)
            felt = self.felt.double().expand(values.shape)
            total += torch.bincount(index.flatten(), felt.flatten(), minlength=len(total))
        return total.view(len(low), _BINS)

    def errors(self, low: Tensor, high: Tensor, spec: QuantSpec) -> Tensor:
        """The weighted square of what these ranges change, by group [G]; of at most 2048 rows."""
        every = -(-len(self.values) // _TRIED)
        values, group = self.values[::every], self.group[::every]
        params = params_from_range(low[:, None], high[:, None], spec, None)
        change = fake_quantize(values.to(low), params, group if spec.boundaries else None) - values
        by_row = change.square() @ self.felt.to(low).expand(values.shape[1])
        return torch.zeros_like(low).index_add_(0, group, by_row)

    def _parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        height = max(1, _VALUES // max(1, self.values.shape[1]))
        return zip(torch.split(self.values, height), torch.split(self.group, height), strict=True)


def search(ends: Ends, sample: Sample, spec: QuantSpec) -> Ends:
    """The part of each group's range with the least weighted square of what clipping and rounding change.

    Both ends are tried on their own, from the whole down to a tenth of it. A group without values, or whose
    values weigh nothing, keeps its range.

    Shapes: ends [G] as they were observed, for all groups of the spec, which is per tensor.
    """
    low, high = (end.double() for end in ends)
    histogram = sample.histogram(low, high)
    factors = torch.logspace(0, torch.tensor(_SMALLEST).log10(), _FACTORS, dtype=torch.float64)
    lower, upper = factors.to(low).repeat_interleave(_FACTORS), factors.to(low).repeat(_FACTORS)
    one_each = replace(spec, boundaries=tuple(map(float, range(len(lower) - 1))))
    found_low, found_high = low.clone(), high.clone()
    middle = (torch.arange(_BINS, dtype=torch.float64, device=low.device) + 0.5) / _BINS
    for k in histogram.sum(1).nonzero().flatten().tolist():
        bins = (low[k] + (high[k] - low[k]) * middle).expand(len(lower), -1)
        params = params_from_range((low[k] * lower)[:, None], (high[k] * upper)[:, None], one_each, None)
        rounded = fake_quantize(bins, params, torch.arange(len(lower), device=low.device))
        best = int(((rounded - bins).square() @ histogram[k]).argmin())
        found_low[k], found_high[k] = low[k] * lower[best], high[k] * upper[best]
    # Values within one bin look alike to the histogram: those of a long tail's middle may fare worse than it says.
    worse = sample.errors(found_low, found_high, spec) > sample.errors(low, high, spec)
    found_low, found_high = low.where(worse, found_low), high.where(worse, found_high)
    return found_low.to(ends[0]), found_high.to(ends[1])


def percentile(ends: Ends, sample: Sample, percent: float) -> Ends:
    """The ends beyond which (100 - percent) / 2 percent of the values lie, on either side.

    Units: they are found to 1/1024 of the range.
    """
    low, high = (end.double() for end in ends)
    counted = Sample(sample.values, sample.group, torch.ones_like(sample.felt)).histogram(low, high)
    reached = counted.cumsum(1) / counted.sum(1, keepdim=True).clamp(min=1)
    beyond = (100 - percent) / 200
    first = (reached <= beyond).sum(1)
    last = _BINS - (reached >= 1 - beyond).sum(1) + 1
    step = (high - low) / _BINS
    live = counted.sum(1) > 0
    found_low, found_high = (low + first * step).where(live, low), (low + last * step).where(live, high)
    return found_low.to(ends[0]), torch.minimum(found_high, high).to(ends[1])


@dataclass(frozen=True, eq=False)
class RowExtremes:
    """The extremes of single calibration rows, or of batches of them, in the order in which they are averaged.

    Shapes: low, high [N, C]; group int64 [N].
    Units: `momentum` of the average stays when a row, or a batch, comes.
    """

    low: Tensor
    high: Tensor
    group: Tensor
    momentum: float = MOMENTUM

    def joined(self, size: int, generator: torch.Generator) -> RowExtremes:
        """Those of batches of so many rows of one group, drawn at random; the last of a group may have fewer.

        Random they are of 1, too: in the order of the timesteps an average would be that of the last ones.
        """
        order = torch.randperm(len(self.group), generator=generator).to(self.group.device)
        batches = [
            rows
            for k in torch.unique(self.group)
            for rows in torch.split(order[self.group[order] == k], size)
        ]
        low, high = ([self.low[b].amin(0) for b in batches], [self.high[b].amax(0) for b in batches])
        group = torch.stack([self.group[b[0]] for b in batches])
        return replace(self, low=torch.stack(low), high=torch.stack(high), group=group)

    def average(self, ends: Ends, gamma: Tensor | None = None) -> Ends:
        """The extremes of whole rows of x / gamma, averaged exponentially within each group, with gradients.

        Shapes: ends [G], kept by a group without rows; gamma [C]; result [G].
        """
        low, high = (self.low, self.high) if gamma is None else (self.low / gamma, self.high / gamma)
        found = []
        for end, rows in zip(ends, (low.amin(1), high.amax(1)), strict=True):
            total = torch.zeros_like(end).index_add(0, self.group, self.weight.to(rows) * rows)
            found.append(torch.where(self._count(len(end)) > 0, total, end))
        return found[0], found[1]

    @cached_property
    def weight(self) -> Tensor:
        """What each row weighs in the average of its group, float64 [N]; they add up to 1 in each."""
        found = torch.ones(len(self.group), dtype=torch.float64, device=self.group.device)
        for k in torch.unique(self.group):
            own = (self.group == k).nonzero()[:, 0]
            later = torch.arange(len(own) - 1, -1, -1, dtype=torch.float64, device=own.device)
            share = self.momentum**later
            share[1:] *= 1 - self.momentum  # the first row is where the average begins
            found[own] = share
        return found

    def _count(self, groups: int) -> Tensor:
        return torch.bincount(self.group, minlength=groups)
