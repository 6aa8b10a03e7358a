"""Passes that decide about one tensor at a time, and the walk that several of them share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from tqdm import tqdm

from dmqfx.calibration.calibration import Calibration
from dmqfx.errors import CalibrationError
from dmqfx.graph.address import Site
from dmqfx.graph.pipeline import JointPass, Pass, PassContext, Preserves
from dmqfx.graph.program import Program
from dmqfx.graph.table import Entry, Table
from dmqfx.sweep.chunks import chunked
from dmqfx.sweep.finite import refuse_broken_weights
from dmqfx.sweep.turn import Turn
from dmqfx.sweep.walk import Walk

__all__ = ["SweepPass"]


@dataclass(frozen=True)
class SweepPass(JointPass):
    """A pass that writes entries for the readers of one tensor at a time, when the tensor's turn comes.

    It sees that tensor in the float network and in the network as quantized so far. Consecutive sweep
    passes share one walk: at each turn they run in their order, then the walk goes on.
    """

    preserves: ClassVar[Preserves] = Preserves.BITWISE

    @abstractmethod
    def visit(self, turn: Turn, ctx: PassContext) -> Iterable[tuple[Site, Entry]]:
        """Entries for the readers of a turn's tensor; each is in the turn's table once it is handed out."""

    @property
    def needs_calibration(self) -> bool:
        """Whether it looks at activations; a sweep in which nobody does runs no forward pass."""
        return True

    @classmethod
    def run_jointly(cls, steps: Sequence[tuple[Pass, PassContext]], program: Program) -> Program:
        """Walk once; every step visits every turn.

        Raises: CalibrationError without calibration data, if some step needs it.
        """
        passes = [(step, ctx) for step, ctx in steps if isinstance(step, SweepPass)]
        ctx = passes[0][1]
        refuse_broken_weights(program)
        data = _calibration(program, passes)
        chunks = [] if data is None else chunked(data, program, ctx.chunk)
        total = 0 if data is None else len(data)
        walk = Walk(program, chunks, memory=ctx.memory, total=total, seed=ctx.seed)
        title = ", ".join(step.name() for step, _ in passes)
        with tqdm(total=walk.schedule.turns, desc=title, unit="layer", disable=not ctx.progress) as bar:

            def visit(turn: Turn) -> Table:
                bar.set_postfix_str(str(turn.site.at), refresh=False)
                for step, own in passes:
                    for site, entry in step.visit(turn, own):
                        turn.table = turn.table.put(site, entry)
                bar.update()
                return turn.table

            return program.with_table(walk.run(visit))


def _calibration(program: Program, passes: Sequence[tuple[SweepPass, PassContext]]) -> Calibration | None:
    """The calibration data, or None where no pass looks at any.

    Raises: CalibrationError for data that are missing or do not fit.
    """
    needy = [step.name() for step, _ in passes if step.needs_calibration]
    data = passes[0][1].calibration
    if not needy:
        return None
    if data is None:
        raise CalibrationError(
            f"{needy[0]} needs calibration data; pass calibration= or let compile make one"
        )
    data.check(program.inputs)
    return data
