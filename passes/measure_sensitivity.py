"""measure-sensitivity: how much the UNet's output feels an error of each planned layer's output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dmqfx.graph.facts import MEASURED, PLANNED, QDQ, Fact
from dmqfx.graph.options import at_least
from dmqfx.graph.pipeline import Pass, PassContext, Preserves
from dmqfx.graph.program import Program
from dmqfx.sweep.sensitivitysweep import measure


@dataclass(frozen=True)
class MeasureSensitivity(Pass):
    """Write a Sensitivity per layer with planned weights; round-weights then minds it.

    Where what the rows keep for their way back does not fit the memory, residual blocks are computed again and
    batches in parts, which changes last digits.

    Units: rows of calibration to look at, in equal shares of timesteps; groups of equal width that the
    training timesteps are cut into.
    Source: the empirical Fisher information of the output, as a metric on each layer's output channels.
    """

    requires: ClassVar[frozenset[Fact]] = frozenset({PLANNED})
    provides: ClassVar[frozenset[Fact]] = frozenset({MEASURED})
    forbids: ClassVar[frozenset[Fact]] = frozenset({QDQ})
    preserves: ClassVar[Preserves] = Preserves.BITWISE
    rows: int = 80
    groups: int = 20

    def __post_init__(self) -> None:
        at_least(self, 1, "rows", "groups")

    @property
    def needs_calibration(self) -> bool:
        """Always."""
        return True

    @property
    def budgeted(self) -> frozenset[str]:
        """The fields that a time budget multiplies."""
        return frozenset({"rows"})

    def run(self, program: Program, ctx: PassContext) -> Program:
        """Two looks back over the rows.

        Raises: CalibrationError without calibration data, for rows that do not fit, or weights that are not finite;
            StoreError for a run directory or a disk.
        """
        kept = {
            site: entry
            for site, entry in ctx.journal.fuelled(measure(program, self, ctx).items())
            if ctx.journal.apply(site, "measure")
        }
        return program.with_table(program.table.put_all(kept))
