"""What arrives at the sites of ranges, counted by plain arithmetic that shares nothing with the observers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dmqfx.checking.faked import arguments, group_of
from dmqfx.graph.address import Site
from dmqfx.graph.program import Program
from dmqfx.graph.table import Range

__all__ = ["Seen", "seen_at"]

_SLACK = 1e-4  # of the width of a range
_ROUNDINGS = 20  # of the tensor's greatest value: sums in another order differ in their last digits


@dataclass(frozen=True, eq=False)
class Seen:
    """Statistics of one site.

    Shapes: low, high [G, C], infinite for a group without rows; count float64 [G] of values per channel; total,
    squares float64 [G, C], sums of the values and of their squares.
    """

    low: Tensor
    high: Tensor
    count: Tensor
    total: Tensor
    squares: Tensor

    @staticmethod
    def of(x: Tensor, group: Tensor, axis: int, groups: int) -> Seen:
        """Of one batch [B, ...] whose rows belong to the groups [B]."""
        rows = x.movedim(axis, 1).flatten(2) if x.dim() > 2 else x[:, :, None]
        low, high = (x.new_full((groups, rows.shape[1]), end) for end in (torch.inf, -torch.inf))
        total, squares = (torch.zeros_like(low, dtype=torch.float64) for _ in range(2))
        count = total.new_zeros(groups)
        for g in sorted(set(group.tolist())):
            of_group = rows[group == g]
            low[g], high[g] = of_group.amin((0, 2)), of_group.amax((0, 2))
            count[g] = of_group.shape[0] * of_group.shape[2]
            total[g], squares[g] = of_group.double().sum((0, 2)), of_group.double().square().sum((0, 2))
        return Seen(low, high, count, total, squares)

    def merge(self, other: Seen) -> Seen:
        """Of both together."""
        return Seen(
            torch.minimum(self.low, other.low),
            torch.maximum(self.high, other.high),
            self.count + other.count,
            self.total + other.total,
            self.squares + other.squares,
        )

    def against(self, claimed: Range, eps: float, *, exactly: bool) -> Iterator[str]:
        """What speaks against a range: values beyond it, or (`exactly`) that it is not made from just these.

        Units: eps is that of the dtype that the values were computed in.
        """
        if exactly and claimed.count.tolist() != self.count.tolist():
            yield f"count is {claimed.count.tolist()}, not {[int(each) for each in self.count.tolist()]}"
        rows = self.count > 0
        for told, wrong in self._wrong(claimed, rows, eps, exactly):
            if bool(wrong.any()):
                row, channel = wrong.nonzero()[0].tolist()
                group = int(rows.nonzero().flatten()[row])
                yield f"channel {channel} of group {group} {told}"

    def _wrong(self, claimed: Range, rows: Tensor, eps: float, exactly: bool) -> Iterator[tuple[str, Tensor]]:
        """What may speak against a range, and in which of the groups `rows` and channels it does."""
        low, high, was_low, was_high = (
            end[rows].double() for end in (self.low, self.high, claimed.low, claimed.high)
        )
        greatest = torch.maximum(low.abs(), high.abs()).amax(1, keepdim=True)
        slack = _SLACK * (high - low) + _ROUNDINGS * eps * greatest
        yield "takes values beyond it", torch.maximum(was_low - low, high - was_high) > slack
        if not exactly:
            return
        count = self.count[rows, None]
        mean = self.total[rows] / count
        deviation = (self.squares[rows] / count - mean.square()).clamp_min(0).sqrt()
        yield "has no value that reaches its ends", torch.maximum(low - was_low, was_high - high) > slack
        yield "has another mean", (claimed.mean[rows] - mean).abs() > slack
        yield "has another variance", (claimed.variance[rows].sqrt() - deviation).abs() > 100 * slack


def seen_at(
    program: Program, batches: Iterable[Mapping[str, Tensor]], ranges: Mapping[Site, Range]
) -> dict[Site, Seen]:
    """What arrives where, in the timestep groups and channels of the ranges; one call of the program per batch."""
    found: dict[Site, Seen] = {}
    for inputs in batches if ranges else ():
        for site, x in arguments(program, inputs, set(ranges)).items():
            known = ranges[site]
            group = group_of(inputs["timestep"], known.boundaries)
            new = Seen.of(x, group, known.axis, len(known.boundaries) + 1)
            found[site] = found[site].merge(new) if site in found else new
    return found
