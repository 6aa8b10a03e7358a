"""What a sweep will take, before it starts: seconds and memory, from one chunk that was tried."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import fx

from dmqfx.sweep.schedule import TURN, Schedule, Segment
from dmqfx.sweep.trial import Trial
from dmqfx.sweep.turn import Reader
from dmqfx.sweep.values import megabytes

__all__ = ["Costly", "Costs", "Estimate", "duration"]


class Costly(Protocol):
    """What an estimate asks of a pass."""

    def cost(self, reader: Reader) -> float:
        """Multiply-adds of the local problem of one reader."""

    def problem_rows(self) -> int:
        """Output positions of one local problem."""


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
        aside = f" and {megabytes(self.disk)} of disk" if self.disk else ""
        took = f"about {duration(self.seconds)}, {megabytes(self.memory)} of memory{aside}"
        return f"{self.rows} calibration rows, {took}"


@dataclass(frozen=True, eq=False)
class Costs:
    """What the parts of a sweep cost.

    Units: rate in multiply-adds per second.
    """

    schedule: Schedule
    trial: Trial
    rate: float

    def estimate(self, steps: Sequence[Costly], rows: int, memory: int) -> Estimate:
        """Of passes over so many calibration rows in a memory budget."""
        problems = max(
            (_nbytes(step, reader) for step in steps for reader in self.schedule.readers), default=0
        )
        wanted = self.kept() * rows // self.trial.rows + problems
        room = memory - self.working()
        seconds = sum(self.turns(steps, rows))
        return Estimate(rows, seconds, self.working() + min(wanted, room), max(wanted - room, 0))

    def turns(self, steps: Sequence[Costly], rows: int) -> list[float]:
        """Seconds until each turn is over, counted from the one before."""
        walk = (2 * self.trial.forward + self.trial.rounding) * rows / self.trial.rows
        moved = [sum(map(self._size, segment.nodes)) for segment in self.schedule.segments]
        found, waiting = [], 0.0
        for segment, share in zip(self.schedule.segments, moved, strict=True):
            waiting += walk * share / max(1, sum(moved))
            for _, readers in segment.turns:
                local = sum(step.cost(reader) for step in steps for reader in readers)
                found.append(waiting + local / self.rate)
                waiting = 0.0
        return [*found[:-1], found[-1] + waiting] if found else []

    def working(self) -> int:
        """The most bytes that computing a chunk takes, both values of everything.

        An upper bound: views count like copies, and what is read as if it had to come from disk.
        """
        return max(map(self._of_segment, self.schedule.segments), default=0)

    def kept(self) -> int:
        """The most bytes of the trial's chunk that wait for a later segment or a turn."""
        differing = self.schedule.differing
        sizes = {node: self._size(node) * (2 if node in differing else 1) for node in self.trial.nbytes}
        most = 0
        for k in range(len(self.schedule.segments)):
            waiting = (node for node in self.schedule.before(k) if self.schedule.next_use(node, 0, (k, TURN)))
            most = max(most, sum(sizes[node] for node in waiting))
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


def duration(seconds: float) -> str:
    """Seconds in words."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _nbytes(step: Costly, reader: Reader) -> int:
    """Memory of a problem's rows: both values in float32, in parts and joined."""
    return 16 * step.problem_rows() * reader.columns
