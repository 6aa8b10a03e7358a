"""fit-ranges: the scale and zero point of every planned activation, one set per timestep group."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from dmqfx.graph.address import Site
from dmqfx.graph.facts import FITTED, PLANNED, SHIFTED, Fact
from dmqfx.graph.pipeline import PassContext
from dmqfx.graph.table import Entry, Range, Shift
from dmqfx.numbers.quant import params_from_range
from dmqfx.sweep.sweep import SweepPass
from dmqfx.sweep.turn import Turn


@dataclass(frozen=True)
class FitRanges(SweepPass):
    """Observe the quantized-so-far tensor and write the Range and the QParams of each site that reads it.

    Where an equivalent scale has been learned, the parameters are those of x / gamma. Shifts that were voted on
    other steps are dropped.
    """

    requires: ClassVar[frozenset[Fact]] = frozenset({PLANNED})
    provides: ClassVar[frozenset[Fact]] = frozenset({FITTED})
    clears: ClassVar[frozenset[Fact]] = frozenset({SHIFTED})

    def visit(self, turn: Turn, ctx: PassContext) -> Iterator[tuple[Site, Entry]]:
        """Minimum and maximum per timestep group."""
        for reader in turn.readers:
            if reader.spec is None:
                continue
            seen = turn.range(reader.spec.boundaries)
            gamma = turn.gamma(reader)
            fitted = seen if gamma is None else _divided(seen, gamma)
            if ctx.journal.apply(reader.site, "minmax", str(reader.spec)):
                turn.table = turn.table.drop(reader.site, Shift)
                yield reader.site, seen
                yield reader.site, params_from_range(fitted.low, fitted.high, reader.spec, seen.axis)


def _divided(seen: Range, gamma: Tensor) -> Range:
    return replace(seen, low=seen.low / gamma, high=seen.high / gamma)
