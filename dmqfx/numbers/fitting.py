"""Which range of an activation its codes should cover, in every timestep group, judged by sampled values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dmqfx.numbers.quant import QuantSpec, fake_quantize, params_from_range

__all__ = ["Ends", "Sample", "percentile", "row_average", "search"]

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


def row_average(low: Tensor, high: Tensor, group: Tensor, ends: Ends, momentum: float) -> Ends:
    """The extremes of single rows, averaged exponentially in their order within each group.

    Shapes: low, high [N] of each row; group int64 [N]; a group without rows keeps its ends.
    """
    found_low, found_high = ends[0].clone(), ends[1].clone()
    for k in torch.unique(group).tolist():
        for end, values in ((found_low, low[group == k]), (found_high, high[group == k])):
            average = values[0]
            for value in values[1:]:
                average = momentum * average + (1 - momentum) * value
            end[k] = average
    return found_low, found_high
