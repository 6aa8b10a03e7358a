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
from dmqfx.graph.table import Entry
from dmqfx.sweep.joint import sweep
from dmqfx.sweep.turn import Reader, Turn

__all__ = ["SweepPass", "solution_cost"]


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

    def cost(self, reader: Reader) -> float:
        """About how many double-precision multiply-adds it spends on a reader.

        Without `rows` none. With them, as much as normal equations, their solution and a rounding that is
        searched; with `iterations`, that many steps forward and back instead.
        """
        rows = self.problem_rows()
        if not rows or not reader.shape or reader.weight_spec is None:
            return 0.0
        out, columns = reader.shape[0], math.prod(reader.shape[1:])
        if iterations := getattr(self, "iterations", 0):
            return float(3 * iterations * rows * columns * out)
        return solution_cost(rows, columns, out)

    def problem_rows(self) -> int:
        """Output positions of one local problem; 0 where there is none."""
        return int(getattr(self, "rows", 0)) if self.needs_calibration else 0

    @classmethod
    def run_jointly(cls, steps: Sequence[tuple[Pass, PassContext]], program: Program) -> Program:
        """Walk once; every step visits every turn.

        Raises: CalibrationError without calibration data, if some step needs it.
        """
        return sweep(program, [(step, ctx) for step, ctx in steps if isinstance(step, SweepPass)])


def solution_cost(rows: int, columns: int, out: int) -> float:
    """Multiply-adds of normal equations, their solution and a rounding that is searched."""
    solution = 2 * columns**3 + 3 * out * columns * (columns + 100)
    return float(rows * columns * (columns + out) + 200 * rows * (columns + out) + solution)
