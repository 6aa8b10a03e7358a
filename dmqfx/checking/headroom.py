"""Ranges follow their tensors: what a pass does to a tensor, it does to what the table says of its range."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from dmqfx.checking.judges import CLOSE, Finding, Inputs, Judge
from dmqfx.checking.seen import Seen, seen_at
from dmqfx.graph.address import Site
from dmqfx.graph.facts import CALIBRATED, INTEGER, QDQ
from dmqfx.graph.program import Program
from dmqfx.graph.table import Range

__all__ = ["Headroom"]


class Headroom(Judge):
    """The room between what arrives at a site and the ends of its range is as before, in units of the range.

    So a pass that divides a tensor must divide its range too, in every timestep group; one that does not touch
    the tensor must leave the range alone. Any inputs serve, not only those that the range was made from.
    """

    def __init__(self, before: Program, probes: Sequence[Inputs]) -> None:
        self.probes, self.limit = probes, 10 * CLOSE[before.dtype]
        self.ranges = _ranges(before)
        self.seen = seen_at(before, probes, self.ranges)

    def judge(self, after: Program) -> Finding:
        ranges = {site: found for site, found in _ranges(after).items() if site in self.seen}
        for site, seen in seen_at(after, self.probes, ranges).items():
            error = _change(self.ranges[site], self.seen[site], ranges[site], seen)
            if not error <= self.limit:
                what = f"change of the room between {site} and its Range"
                return Finding(error, self.limit, what, str(site.at))
        return Finding(0.0, self.limit, "change of the room between sites and their ranges")


def _ranges(program: Program) -> dict[Site, Range]:
    """The ranges of what arrives at sites; behind a dequantize they are those of something else."""
    there = CALIBRATED in program.facts and not {QDQ, INTEGER} & program.facts
    return program.table.of(Range) if there else {}


def _change(was: Range, seen_before: Seen, now: Range, seen: Seen) -> float:
    """How much the room at either end, the mean or the deviation differs, in widths of the range.

    Infinite for other channels, and where a range has a measure before and none after.
    """
    if was.low.shape != now.low.shape or seen_before.low.shape != seen.low.shape:
        return math.inf
    rows = (seen_before.count > 0) & (seen.count > 0)
    low, high, mean, variance = (end[rows].double() for end in (was.low, was.high, was.mean, was.variance))
    now_low, now_high, now_mean, now_variance = (
        end[rows].double() for end in (now.low, now.high, now.mean, now.variance)
    )
    width, above = high - low, high.abs() >= low.abs()
    end, now_end = torch.where(above, high, low), torch.where(above, now_high, now_low)
    wide = width > end.abs() / 10  # the width of others has lost its digits to their ends
    measure, others = width.where(wide, end), (now_high - now_low).where(wide, now_end)
    told = measure != 0  # a range of nothing but 0 has no measure
    scale = (measure / others).where(told, 0.0)
    pairs = (
        (seen_before.low[rows] - low, seen.low[rows] - now_low),
        (high - seen_before.high[rows], now_high - seen.high[rows]),
        (mean - low, now_mean - now_low),
        (variance.sqrt(), now_variance.sqrt()),
    )
    off = torch.stack([(before - after * scale).abs() for before, after in pairs]).amax(0)
    size = (
        width + torch.maximum(low.abs(), high.abs()).amax(1, keepdim=True) / 10
    )  # rounded as coarsely as wide ones
    off = (off / size).where(told, 0.0).where((measure != 0) == (others != 0), math.inf)
    return float(off.max()) if off.numel() else 0.0
