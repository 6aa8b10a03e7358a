"""What a sweep will take, before it starts: seconds and memory, from one chunk that was tried."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from torch import fx

from dmqfx.graph.program import Program
from dmqfx.numbers.speeds import Speeds
from dmqfx.sweep.rows import Geometry
from dmqfx.sweep.schedule import TURN, Schedule, Segment
from dmqfx.sweep.trial import Sampling, Trial
from dmqfx.sweep.turn import Reader
from dmqfx.sweep.values import megabytes

__all__ = ["Costly", "Costs", "Estimate", "duration", "tell"]

_log = logging.getLogger(__name__)


class Costly(Sampling, Protocol):
    """What an estimate asks of a pass."""

    def cost(self, program: Program, reader: Reader, values: float, speeds: Speeds) -> float:
        """Seconds for one reader of a tensor that has so many numbers on all calibration rows, calls left out."""

    def calls(self, reader: Reader) -> int:
        """How often it computes the reader's layer on all calibration rows."""

    def problem_nbytes(self, reader: Reader, rows: int) -> int:
        """What it computes with at so many output positions, beside the rows that it draws."""


@dataclass(frozen=True)
class Estimate:
    """What a sweep over so many calibration rows will take.

    Units: seconds; memory in bytes, beside the model; disk in bytes, of what memory has no room for.
    """

    rows: int
    seconds: float
    memory: int
    disk: int = 0

    def __str__(self) -> str:
        if not self.rows:
            return f"no forward pass, about {duration(self.seconds)}"
        aside = f" and {megabytes(self.disk)} of disk" if self.disk else ""
        took = f"about {duration(self.seconds)}, {megabytes(self.memory)} of memory{aside}"
        return f"{self.rows} calibration rows, {took}"


@dataclass(frozen=True, eq=False)
class Costs:
    """What the parts of a sweep cost; the trial is an empty one where no pass looks at activations."""

    program: Program
    schedule: Schedule
    trial: Trial
    speeds: Speeds

    def estimate(self, steps: Sequence[Costly], rows: int, memory: int) -> Estimate:
        """Of passes over so many calibration rows in a memory budget."""
        turns = [readers for segment in self.schedule.segments for _, readers in segment.turns]
        problems = max((_nbytes(steps, readers, self.working) for readers in turns), default=0)
        wanted = self.kept * rows // self.trial.rows + problems
        room = memory - self.working
        seconds = sum(self.turns(steps, rows))
        return Estimate(rows, seconds, self.working + min(wanted, room), max(wanted - room, 0))

    def turns(self, steps: Sequence[Costly], rows: int) -> list[float]:
        """Seconds until each turn is over, counted from the one before."""
        differing, share = self.schedule.differing, rows / self.trial.rows
        found, waiting = list[float](), 0.0
        for segment in self.schedule.segments:
            if segment.source is None:  # the walk ends with the last turn
                break
            for node in segment.nodes:
                waiting += self.trial.forward.get(node, 0.0) * (2 if node in differing else 1) * share
            waiting += self.trial.looking.get(segment.source, 0.0) * share
            values = self._size(segment.source) * share / self.program.dtype.itemsize
            for _, readers in segment.turns:
                asked = ((step, reader) for step in steps for reader in readers)
                found.append(
                    waiting + sum(self._of_reader(step, reader, values, share) for step, reader in asked)
                )
                waiting = 0.0
        return found

    def _of_reader(self, step: Costly, reader: Reader, values: float, share: float) -> float:
        own = step.cost(self.program, reader, values, self.speeds)
        if calls := step.calls(reader):
            own += calls * share * self.trial.forward.get(self.program.node(reader.site.at), 0.0)
        return own

    @cached_property
    def working(self) -> int:
        """The most bytes that computing a chunk takes, both values of everything.

        An upper bound: views count like copies, and what is read as if it had to come from disk.
        """
        return max(map(self._of_segment, self.schedule.segments), default=0)

    @cached_property
    def kept(self) -> int:
        """The most bytes of the trial's chunk that wait for a later segment or a turn."""
        differing = self.schedule.differing
        most = 0
        for k in range(len(self.schedule.segments)):
            waiting = (node for node in self.schedule.before(k) if self.schedule.next_use(node, 0, (k, TURN)))
            most = max(most, sum(self._size(node) * (2 if node in differing else 1) for node in waiting))
        return most

    def _of_segment(self, segment: Segment) -> int:
        local: set[fx.Node] = set()
        peak = 0
        for node in segment.nodes:
            reads = self.schedule.reads(node)
            local.update([node, *reads])
            rounding = 3 * max(map(self._size, reads), default=0)  # in floats, in codes, and in floats again
            peak = max(peak, 2 * sum(map(self._size, local)) + rounding)
            local.difference_update(segment.spent.get(node, ()))
        return peak

    def _size(self, node: fx.Node) -> int:
        return self.trial.nbytes.get(node, 0)


def tell(what: str, took: float, estimated: float) -> None:
    """Say how long something took, beside the estimate; the record has both numbers, in seconds."""
    numbers = {"what": what, "took": took, "estimated": estimated}
    _log.info("%s took %s, %s estimated", what, duration(took), duration(estimated), extra=numbers)


def duration(seconds: float) -> str:
    """Seconds in words."""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _nbytes(steps: Sequence[Costly], readers: Sequence[Reader], working: int) -> int:
    """Memory of a turn: both values of its rows in float32, and what the largest problem needs beside `working`."""
    drawn, most = dict[tuple[Geometry, int], int](), 0
    for step in steps:
        for reader in readers:
            rows = step.problem_rows(reader)
            drawn[reader.geometry, rows] = 8 * rows * reader.columns
            most = max(most, step.problem_nbytes(reader, rows))
    return sum(drawn.values()) + max(0, most - working)
