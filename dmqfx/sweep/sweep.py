"""Passes that decide about one tensor at a time, and the walk that several of them share."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from dmqfx.graph.address import Site
from dmqfx.graph.facts import QDQ, Fact
from dmqfx.graph.pipeline import JointPass, Pass, PassContext, Preserves
from dmqfx.graph.program import Program
from dmqfx.graph.table import Entry, Sensitivity
from dmqfx.numbers import effort
from dmqfx.numbers.speeds import Speeds
from dmqfx.sweep.joint import sweep
from dmqfx.sweep.turn import Reader, Turn

__all__ = ["SweepPass"]


@dataclass(frozen=True)
class SweepPass(JointPass):
    """A pass that writes entries for the readers of one tensor at a time, when the tensor's turn comes.

    It sees that tensor in the float network and in the network as quantized so far. Consecutive sweep
    passes share one walk: at each turn they run in their order, then the walk goes on. A time budget
    multiplies its fields `rows` (output positions of a local problem) and `iterations`, if it has them.
    """

    forbids: ClassVar[frozenset[Fact]] = frozenset({QDQ})
    preserves: ClassVar[Preserves] = Preserves.BITWISE

    @abstractmethod
    def visit(self, turn: Turn, ctx: PassContext) -> Iterable[tuple[Site, Entry]]:
        """Entries for the readers of a turn's tensor; each is in the turn's table once it is handed out."""

    @property
    def needs_calibration(self) -> bool:
        """Whether it looks at activations; a sweep in which nobody does runs no forward pass."""
        return True

    @property
    def budgeted(self) -> frozenset[str]:
        """The fields that a time budget multiplies, as far as it has them."""
        return frozenset({"rows", "iterations"})

    def cost(self, program: Program, reader: Reader, values: float, speeds: Speeds) -> float:
        """About how many seconds it spends on a reader of a tensor of so many values over all rows.

        Drawing `problem_rows` is not counted. Without them none; with `iterations`, that many steps forward
        and back, else as much as `reconstruct` takes.
        """
        rows = self.problem_rows(reader)
        if not rows or not reader.shape or reader.weight_spec is None:
            return 0.0
        out, columns = reader.shape[0], math.prod(reader.shape[1:])
        if iterations := getattr(self, "iterations", 0):
            return 3 * iterations * effort.product(speeds, rows, columns, out)
        return self.solution(program, reader, speeds)

    def calls(self, reader: Reader) -> int:
        """How often it computes the reader's layer on all calibration rows: those calls are not in `cost`."""
        return 0

    def solution(self, program: Program, reader: Reader, speeds: Speeds) -> float:
        """Seconds of a reader's normal equations and of codes by handing errors on."""
        out, columns = reader.shape[0], math.prod(reader.shape[1:])
        rows, taps = self.problem_rows(reader), reader.geometry.taps
        return effort.reconstruction(
            speeds, rows, columns, out, metric=has_metric(program, reader), taps=taps
        )

    def problem_rows(self, reader: Reader) -> int:
        """Output positions of a reader's local problem that it draws; 0 where there is none."""
        return int(getattr(self, "rows", 0)) if self.needs_calibration and reader.weight_spec else 0

    def problem_nbytes(self, reader: Reader, rows: int) -> int:
        """What it computes with at that many output positions, beside the rows that it draws, in bytes."""
        return 0

    @classmethod
    def run_jointly(cls, steps: Sequence[tuple[Pass, PassContext]], program: Program) -> Program:
        """Walk once; every step visits every turn.

        Raises: CalibrationError without calibration data, if some step needs it.
        """
        return sweep(program, [(step, ctx) for step, ctx in steps if isinstance(step, SweepPass)])


def has_metric(program: Program, reader: Reader) -> bool:
    """Whether it is known what the UNet's output feels of each channel of a reader's output."""
    felt = program.table.get(Site(reader.site.at, "out"), Sensitivity)
    return felt is not None and felt.metric is not None
