"""measure-sensitivity: how much the UNet's output feels an error of each planned layer's output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dmqfx.errors import CalibrationError
from dmqfx.graph.facts import MEASURED, PLANNED, QDQ, Fact
from dmqfx.graph.pipeline import Pass, PassContext, Preserves
from dmqfx.graph.program import Program
from dmqfx.sweep.chunks import chunked, shared
from dmqfx.sweep.sensitivity import measure


@dataclass(frozen=True)
class MeasureSensitivity(Pass):
    """Write a Sensitivity per layer with planned weights; round-weights then minds it.

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

    @property
    def needs_calibration(self) -> bool:
        """Always."""
        return True

    def run(self, program: Program, ctx: PassContext) -> Program:
        """Two looks back over the rows.

        Raises: CalibrationError without calibration data, or for rows that do not fit.
        """
        if ctx.calibration is None:
            raise CalibrationError(
                "measure-sensitivity needs calibration data; pass calibration= or let compile make one"
            )
        ctx.calibration.check(program.inputs)
        chosen = ctx.calibration.select(self.rows, ctx.generator())
        chunks = list(shared(chunked(chosen, program, ctx.chunk), chosen, ctx.chunk))
        edges = tuple(ctx.train_timesteps * k / self.groups for k in range(1, self.groups))
        found = measure(program, chunks, edges, ctx.generator())
        kept = {
            site: entry
            for site, entry in ctx.journal.fuelled(found.items())
            if ctx.journal.apply(site, "measure")
        }
        return program.with_table(program.table.put_all(kept))
