"""Measuring sensitivity: what it will take is said, then two looks at the rows, kept in a run directory."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, Protocol

import torch
from tqdm import tqdm

from dmqfx import processes
from dmqfx.calibration.calibration import Calibration
from dmqfx.graph.address import Site
from dmqfx.graph.pipeline import PassContext
from dmqfx.graph.program import Program
from dmqfx.graph.table import Sensitivity, Table
from dmqfx.numbers import speeds
from dmqfx.numbers.speeds import row_time
from dmqfx.sweep.budget import scaled
from dmqfx.sweep.chunks import Chunk, chunked, shared
from dmqfx.sweep.estimate import Estimate, tell
from dmqfx.sweep.finite import refuse_broken_weights
from dmqfx.sweep.key import of_table
from dmqfx.sweep.network import Network
from dmqfx.sweep.plan import Named, calibration_for, settled, tell_plan, warn_of_memory
from dmqfx.sweep.run import NoRun
from dmqfx.sweep.sensitivity import Measurement
from dmqfx.sweep.visits import kept

__all__ = ["measure"]

_log = logging.getLogger(__name__)
_PORTION: Final = "portion"
_OFTEN: Final = 300.0
"""Seconds of work that a killed process may lose: what is kept is as large as the weights."""


class Measurer(Named, Protocol):
    """A pass that measures: `rows` of calibration, `groups` of timesteps that count alike."""

    @property
    def rows(self) -> int: ...

    @property
    def groups(self) -> int: ...


def measure(program: Program, step: Measurer, ctx: PassContext) -> dict[Site, Sensitivity]:
    """The sensitivity of every layer with planned weights, at the site of its output.

    Where there are several processes each looks at its rows and keeps its own sums, which are joined when all are there.

    Raises: CalibrationError without calibration data, for data that do not fit, for weights that are not finite;
        StoreError for a run directory or a disk.
    """
    refuse_broken_weights(program)
    data = calibration_for(program, [(step, ctx)])
    assert data is not None  # it needs some
    edges = tuple(ctx.train_timesteps * k / step.groups for k in range(1, step.groups))
    found = Measurement(Network(program), program, edges, ctx.generator())
    if not found.watched:
        return {}
    with kept(program, data, [(step, ctx)], own=True) as run:
        own = run.own()
        known = own.state()
        begun, sums = (0, None) if known is None else known
        plan = _planned(found, program, step, ctx, data, run, None if sums is None else int(sums[_PORTION]))
        started = speeds.clock()
        if sums is not None:
            found.resume(sums)
        _look(found, plan, own, begun, ctx)
        tell(step.name(), speeds.clock() - started, plan.seconds)
    entries = found.entries()
    processes.same("sensitivities", of_table(Table().put_all(entries)))
    return entries


@dataclass(frozen=True, eq=False)
class _Plan:
    """The rows in parts of at most `portion` rows, and the seconds that two looks will take."""

    parts: Sequence[Chunk]
    portion: int
    seconds: float


def _planned(
    found: Measurement,
    program: Program,
    step: Measurer,
    ctx: PassContext,
    data: Calibration,
    run: NoRun,
    portion: int | None,
) -> _Plan:
    """The plan, said in one line; a run that was begun before, whose looks are counted, goes on with its `portion`."""
    network = found.network
    largest = max(chunked(data, program, ctx.chunk), key=lambda chunk: chunk.inputs["sample"].numel())
    sums = found.nbytes * (2 if ctx.run_dir is not None else 1)  # they are copied to be kept
    memory = max(1, ctx.memory - sums)
    room = network.tried(network.room(largest, memory, found.watched), largest, memory, found.try_out)
    one = row_time(program.device, lambda count: found.try_out(largest.part(slice(count))), room.rows)

    def seconds(factor: float) -> float:
        return 2 * one * min(scaled(step, factor).rows, len(data)) / processes.count()

    factor = processes.agreed(settled(run.factor, ctx, seconds))
    run.begin(factor)
    chosen = data.select(scaled(step, factor).rows, ctx.generator())
    estimate = Estimate(len(chosen), seconds(factor), room.nbytes + sums)
    tell_plan(step.name(), estimate, [(step, ctx)], factor)
    warn_of_memory(room.nbytes + sums, step, ctx)
    portion = room.rows if portion is None else portion
    parts = [
        chunk.part(slice(start, start + portion))
        for chunk in shared(chunked(chosen, program, ctx.chunk), chosen, ctx.chunk)
        for start in range(0, len(chunk.timestep), portion)
    ]
    return _Plan(parts, portion, estimate.seconds)


def _look(found: Measurement, plan: _Plan, own: NoRun, begun: int, ctx: PassContext) -> None:
    """Both looks at all rows of this process, but for what it saw before."""
    looks = [partial(look, part) for look in (found.look, found.look_again) for part in plan.parts]
    # All wait for each other here: nobody keeps a look before the run's plan is there.
    before, total = processes.summed(torch.tensor([begun, len(looks)])).tolist()
    if before:
        _log.info("%d of %d looks were taken before", before, total)
    saved = speeds.clock()
    with tqdm(total=len(looks), initial=begun, desc="measure-sensitivity", disable=not ctx.progress) as bar:
        for number, look in enumerate(looks[begun:], begun + 1):
            look()
            bar.update()
            if number == len(looks) or speeds.clock() - saved > _OFTEN:
                own.keep(number, {**found.state(), _PORTION: torch.tensor(plan.portion)})
                saved = speeds.clock()
