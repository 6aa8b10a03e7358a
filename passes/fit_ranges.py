"""fit-ranges: the scale and zero point of every planned activation, one set per timestep group."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from dmqfx.graph.address import Site
from dmqfx.graph.facts import FITTED, PLANNED, SHIFTED, STEPPED, Fact
from dmqfx.graph.options import at_least
from dmqfx.graph.pipeline import PassContext
from dmqfx.graph.program import Program
from dmqfx.graph.table import Entry, Range, Shift
from dmqfx.numbers import effort
from dmqfx.numbers.fitting import MOMENTUM, PERCENT, Ends, Sample, percentile, search
from dmqfx.numbers.quant import QuantSpec, params_from_range
from dmqfx.numbers.speeds import Speeds
from dmqfx.numbers.voting import nearest_full
from dmqfx.runtime.operators import timestep_group
from dmqfx.sweep.sweep import SweepPass
from dmqfx.sweep.turn import Reader, Turn


@dataclass(frozen=True)
class FitRanges(SweepPass):
    """Observe the quantized-so-far tensor and write the Range and the QParams of each site that reads it.

    The plan says how: `minmax`, the extremes; `mse`, the part of them with the least error of what the layer
    makes of it (of the UNet's output, as far as measure-sensitivity knows); `percentile`, all but the outermost
    values; `ema`, the extremes of batches, averaged. A timestep group without rows takes what was found for the
    nearest one that has some. Where an equivalent scale has been learned, the
    parameters are those of x / gamma. Shifts that were voted on other steps are dropped.

    Units: `rows` output positions are looked at for `mse` and `percentile`; `percent` of the values lie inside;
    `ema` joins the extremes of `batch` rows of a timestep group, drawn at random;
    `momentum` of the average stays when a batch comes.
    Source: `ema` is the observer of DMQ (arXiv 2507.12933), begun anew in every timestep group.
    """

    requires: ClassVar[frozenset[Fact]] = frozenset({PLANNED})
    provides: ClassVar[frozenset[Fact]] = frozenset({FITTED})
    clears: ClassVar[frozenset[Fact]] = frozenset({SHIFTED, STEPPED})
    rows: int = 8192
    percent: float = PERCENT
    momentum: float = MOMENTUM
    batch: int = 1

    def __post_init__(self) -> None:
        at_least(self, 1, "batch")
        if self.rows < 1:
            raise ValueError(f"rows must be at least 1, not {self.rows}")
        if not 0 < self.percent <= 100:
            raise ValueError(f"percent must be above 0 and at most 100, not {self.percent}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be at least 0 and below 1, not {self.momentum}")

    def cost(self, program: Program, reader: Reader, values: float, speeds: Speeds) -> float:
        """Seconds of the histograms and of the search."""
        rows = self.problem_rows(reader)
        if not rows or reader.spec is None:
            return 0.0
        return effort.fitted_range(speeds, rows * reader.columns, len(reader.spec.boundaries) + 1)

    def problem_rows(self, reader: Reader) -> int:
        """None where the extremes tell."""
        return self.rows if reader.spec is not None and reader.spec.range in ("mse", "percentile") else 0

    def visit(self, turn: Turn, ctx: PassContext) -> Iterator[tuple[Site, Entry]]:
        """The ends of every timestep group, and the finest grid between them."""
        for reader in turn.readers:
            if reader.spec is None:
                continue
            seen = turn.range(reader.spec.boundaries)
            gamma = turn.gamma(reader)
            fitted = seen if gamma is None else _divided(seen, gamma)
            if ctx.journal.apply(reader.site, reader.spec.range, str(reader.spec)):
                turn.table = turn.table.drop(reader.site, Shift)
                low, high = self._ends(turn, reader, reader.spec, fitted)
                yield reader.site, seen
                yield reader.site, params_from_range(low, high, reader.spec, seen.axis)

    def _ends(self, turn: Turn, reader: Reader, spec: QuantSpec, seen: Range) -> Ends:
        """Both [G, C], or [G, 1] where they are those of all channels together."""
        if spec.range == "minmax":
            return seen.low, seen.high
        low, high = seen.low.amin(1).clamp(max=0), seen.high.amax(1).clamp(min=0)
        if spec.range == "ema":
            rows = turn.row_extremes(spec.boundaries, self.momentum).joined(self.batch, turn.generator())
            found = rows.average((low, high), turn.gamma(reader))
        elif spec.range == "mse":
            found = search((low, high), self._sample(turn, reader, spec), spec)
        else:
            found = percentile((low, high), self._sample(turn, reader, spec), self.percent)
        nearest = nearest_full(seen.count)  # what was found for it, where a group has no rows of its own
        return found[0][nearest][:, None], found[1][nearest][:, None]

    def _sample(self, turn: Turn, reader: Reader, spec: QuantSpec) -> Sample:
        rows = turn.rows(reader, self.rows)
        gamma, felt = turn.gamma(reader), turn.felt(reader)
        columns = None if gamma is None else gamma.to(rows.quantized).repeat_interleave(rows.taps)
        values = rows.quantized if columns is None else rows.quantized / columns
        return Sample(
            values, _groups(spec, rows.timestep), values.new_ones(values.shape[1]) if felt is None else felt
        )


def _groups(spec: QuantSpec, timestep: Tensor) -> Tensor:
    return timestep_group(timestep, torch.tensor(spec.boundaries, device=timestep.device))


def _divided(seen: Range, gamma: Tensor) -> Range:
    return replace(seen, low=seen.low / gamma, high=seen.high / gamma)
