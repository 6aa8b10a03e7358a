"""What a sweep goes on with: how much data, in which portions, with which options; and what that will take."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from dmqfx import processes
from dmqfx.calibration.calibration import Calibration
from dmqfx.errors import CalibrationError
from dmqfx.graph.address import Site
from dmqfx.graph.pipeline import PassContext
from dmqfx.graph.program import Program
from dmqfx.graph.table import Entry
from dmqfx.numbers.speeds import Speeds
from dmqfx.runtime.operators import timestep_group
from dmqfx.sweep.budget import FACTORS, fitting, scaled
from dmqfx.sweep.chunks import Chunk, chunked, own_rows, shared
from dmqfx.sweep.estimate import Costly, Costs, Estimate, duration
from dmqfx.sweep.schedule import Schedule
from dmqfx.sweep.trial import Trial
from dmqfx.sweep.turn import Turn
from dmqfx.sweep.values import megabytes

__all__ = [
    "Learner",
    "Named",
    "Passes",
    "Plan",
    "Steps",
    "Visitor",
    "calibration_for",
    "planned",
    "settled",
    "tell_plan",
    "told_options",
    "warn_of_memory",
]

_log = logging.getLogger(__name__)

WORKING = 2**29
"""Bytes that computing one chunk may take: not of the memory budget, on which no result depends."""


class Named(Protocol):
    """What this module, and a run directory, ask of every pass that looks at calibration data."""

    @property
    def needs_calibration(self) -> bool:
        """Whether it looks at activations."""

    @classmethod
    def name(cls) -> str:
        """As in policies."""


class Learner(Named, Protocol):
    """A pass that learns from batches of calibration rows.

    Units: rows of calibration, batch of them at a time; iterations.
    """

    @property
    def rows(self) -> int: ...

    @property
    def batch(self) -> int: ...

    @property
    def iterations(self) -> int: ...


class Visitor(Costly, Named, Protocol):
    """A pass, as far as a sweep knows it."""

    def visit(self, turn: Turn, ctx: PassContext) -> Iterable[tuple[Site, Entry]]:
        """Entries for the readers of a turn's tensor."""


Steps: TypeAlias = Sequence[tuple[Visitor, PassContext]]
Passes: TypeAlias = Sequence[tuple[Named, PassContext]]


@dataclass(frozen=True)
class Plan:
    """Passes and calibration rows as a time budget wants them.

    Where processes share the rows, `chunks` are those of this one and `rows` counts all.

    Units: room in bytes for values that are kept, working for computing; seconds by turn; factor as in `budget`.
    """

    steps: Steps
    chunks: Iterable[Chunk]
    rows: int
    room: int
    working: int
    factor: float
    seconds: Sequence[float]


def calibration_for(program: Program, steps: Passes) -> Calibration | None:
    """The calibration data, or None where no pass looks at any.

    Raises: CalibrationError for data that are missing or do not fit.
    """
    data, needy = steps[0][1].calibration, [step.name() for step, _ in steps if step.needs_calibration]
    if not needy:
        return None
    if data is None:
        raise CalibrationError(
            f"{needy[0]} needs calibration data; pass calibration= or let compile make one"
        )
    data.check(program.inputs)
    return data


def planned(
    program: Program, schedule: Schedule, data: Calibration | None, steps: Steps, factor: float | None
) -> Plan:
    """The plan of a sweep, said in one line; `factor` is given where a run had already settled it.

    Raises: CalibrationError for a memory budget without room for one chunk.
    """
    ctx, layers = steps[0][1], len(schedule.sites)
    title = f"{', '.join(step.name() for step, _ in steps)} over {layers} tensors"
    if data is None:
        costs = Costs(program, schedule, Trial(1, {}, {}, {}), Speeds(program.device))
        estimate = costs.estimate([step for step, _ in steps], 0, ctx.memory)
        _log.info("%s, %s", title, estimate, extra={"memory": estimate.memory})
        return Plan(steps, (), 0, ctx.memory, 0, 1.0, costs.turns([step for step, _ in steps], 0))
    _warn_of_gaps(schedule, data.timesteps())
    size, costs = _tried(program, schedule, data, steps)
    factor = processes.agreed(settled(factor, ctx, lambda f: _estimate(costs, data, steps, f).seconds))
    tell_plan(title, _estimate(costs, data, steps, factor), steps, factor)
    some, fewer = [(scaled(step, factor), own) for step, own in steps], _fewer(data, factor, ctx)
    seconds = costs.turns([step for step, _ in some], own_rows(fewer))
    room, chunks = ctx.memory - costs.working, shared(chunked(fewer, program, size), fewer, size)
    return Plan(some, chunks, len(fewer), room, costs.working, factor, seconds)


def settled(factor: float | None, ctx: PassContext, seconds: Callable[[float], float]) -> float:
    """The factor that a run had settled before, else the one that the time budget has a share for, else 1."""
    if factor is None and ctx.budget is not None:
        factor = fitting(seconds, ctx.budget.share)
    return 1.0 if factor is None else factor


def tell_plan(
    title: str, estimate: Estimate, steps: Passes, factor: float, whole: float | None = None
) -> None:
    """Say what passes will take, and warn of a time budget that is too small.

    Units: whole in seconds of all of it, where the estimate is of what is left.
    """
    budget, told = steps[0][1].budget, told_options(steps, factor)
    numbers = {"memory": estimate.memory, "seconds": estimate.seconds, "factor": factor}
    _log.info("%s, %s%s", title, estimate, told, extra=numbers)
    if budget is not None and (estimate.seconds if whole is None else whole) > budget.share:
        least = ", and the least there is" if factor <= FACTORS[-1] else ""
        words = "that is more than its share of the budget of %s, %s%s"
        _log.warning(words, duration(budget.seconds), duration(budget.share), least)


def warn_of_memory(nbytes: int, step: Named, ctx: PassContext) -> None:
    """Say that one row forward and back takes more than the memory budget."""
    if nbytes > ctx.memory:
        _log.warning(
            "that is more than the memory budget of %s: one row, forward and back, takes as much\n"
            "  mend: a greater memory budget, or no %s in the policy",
            megabytes(ctx.memory),
            step.name(),
        )


def _tried(program: Program, schedule: Schedule, data: Calibration, steps: Steps) -> tuple[int, Costs]:
    """The rows of a chunk, and what such a chunk costs where the rows are largest."""
    ctx, speeds = steps[0][1], Speeds(program.device)
    largest = max(data.groups, key=lambda group: prod(group.columns["sample"].values.shape[1:]))
    sample = replace(data, groups=(largest,))
    one = Trial.of(program, next(chunked(sample, program, 1)))
    size = max(1, min(ctx.chunk, WORKING // max(1, Costs(program, schedule, one, speeds).working)))
    chunk, looking = next(chunked(sample, program, size)), [step for step, _ in steps]
    costs = Costs(program, schedule, Trial.of(program, chunk, looking, len(data)), speeds)
    if ctx.memory < costs.working:
        raise CalibrationError(
            f"a memory budget of {megabytes(ctx.memory)} has no room for {costs.trial.rows} calibration rows at a time,"
            f" which take {-(-costs.working // 2**20)} MB\n  mend: memory= of at least that"
        )
    return size, costs


def _warn_of_gaps(schedule: Schedule, timesteps: Tensor) -> None:
    """Say which timestep groups no calibration row falls into."""
    for boundaries in dict.fromkeys(reader.spec.boundaries for reader in schedule.readers if reader.spec):
        group = timestep_group(timesteps, torch.tensor(boundaries))
        empty = sorted(set(range(len(boundaries) + 1)) - set(group.tolist()))
        if empty:
            _log.warning(
                "%d of %d timestep groups have no calibration row (%s); they take the nearest group's ranges",
                len(empty), len(boundaries) + 1, ", ".join(map(str, empty)),
            )  # fmt: skip


def _estimate(costs: Costs, data: Calibration, steps: Steps, factor: float) -> Estimate:
    some, fewer = [scaled(step, factor) for step, _ in steps], _fewer(data, factor, steps[0][1])
    return costs.estimate(some, own_rows(fewer), steps[0][1].memory)


def _fewer(data: Calibration, factor: float, ctx: PassContext) -> Calibration:
    """A share of the rows, though at least one of each timestep."""
    if factor >= 1:
        return data
    least = len(set(data.timesteps().tolist()))
    return data.select(max(least, round(len(data) * factor)), ctx.generator())


def told_options(steps: Passes, factor: float) -> str:
    """What a factor changed, in words; it goes into the passes' records too."""
    if factor == 1:
        return ""
    for step, own in steps:
        changed = scaled(step, factor)
        own.journal.note = f"{changed} instead of {step} for the time budget" if changed != step else ""
    return f", options times {factor:g} for the time budget"
