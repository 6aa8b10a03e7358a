"""Blocks learned one after the other: what it will take is said, then the walk, with what a run directory knows."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from dmqfx import processes
from dmqfx.calibration.calibration import Calibration
from dmqfx.graph.address import Site
from dmqfx.graph.blocks import Block
from dmqfx.graph.journal import Journal
from dmqfx.graph.pipeline import PassContext
from dmqfx.graph.program import Program
from dmqfx.graph.table import Entry, Table
from dmqfx.sweep.blocktrial import BlockTrial
from dmqfx.sweep.blockwalk import Arrival, BlockWalk
from dmqfx.sweep.budget import scaled
from dmqfx.sweep.chunks import Chunk, mixed
from dmqfx.sweep.estimate import tell
from dmqfx.sweep.finite import refuse_broken_weights
from dmqfx.sweep.key import of_table
from dmqfx.sweep.plan import Learner, calibration_for, settled, tell_plan, told_options
from dmqfx.sweep.progress import Progress
from dmqfx.sweep.run import Written, packed, unpacked
from dmqfx.sweep.values import megabytes
from dmqfx.sweep.visits import Visits, kept, taken

__all__ = ["BlockLearner", "learn_blocks"]

_log = logging.getLogger(__name__)


class BlockLearner(Learner, Protocol):
    """A pass that learns blocks, each with so many iterations."""

    def learn(
        self,
        program: Program,
        table: Table,
        block: Block,
        arrivals: Sequence[Arrival],
        ctx: PassContext,
    ) -> tuple[dict[Site, Entry], float | None]:
        """What the table gets for a block, and the loss that is left, if there is one."""


def learn_blocks(program: Program, order: Sequence[Block], step: BlockLearner, ctx: PassContext) -> Program:
    """The program with what the pass learned, block by block, in its table.

    Where there are several processes the first one learns, and all get its entries bit for bit.

    Raises: CalibrationError without calibration data, for data that do not fit, for values that are not
        finite; StoreError for a run directory or a disk.
    """
    refuse_broken_weights(program)
    data = calibration_for(program, [(step, ctx)])
    assert data is not None  # a learner needs some
    if not order:
        return program
    first = processes.is_first()
    table = _learned(program, order, step, ctx, data) if first else _heard(program, order, step, ctx)
    processes.same("table", of_table(table))
    return program.with_table(table)


def _learned(
    program: Program, order: Sequence[Block], step: BlockLearner, ctx: PassContext, data: Calibration
) -> Table:
    """The table that the first process, or the only one, comes to."""
    sites = [Site(block.at, "out") for block in order]
    with kept(program, data, [(step, ctx)]) as run:
        done = run.finished(sites)
        visits = Visits(run, sites, done, what=_named(order), told=_tell_others)
        plan = None if visits.complete else _planned(program, order, step, ctx, data, run.factor, len(done))
        factor = processes.agreed(plan.factor if plan is not None else run.factor or 1.0)
        if plan is None:
            told_options([(step, ctx)], factor)
            return visits.replay(program.table, [ctx.journal])
        run.begin(factor)
        with Progress(step.name(), plan.seconds, shown=ctx.progress) as bar:
            walk = BlockWalk(program, plan.chunks, order, memory=plan.room, folder=ctx.run_dir)
            table = walk.run(
                partial(_visited, program=program, visits=visits, step=plan.step, ctx=ctx, bar=bar)
            )
        tell(step.name(), bar.elapsed, sum(plan.seconds))
    return table


def _visited(
    table: Table,
    block: Block,
    arrivals: Sequence[Arrival],
    *,
    program: Program,
    visits: Visits,
    step: BlockLearner,
    ctx: PassContext,
    bar: Progress,
) -> Table:
    """The table after a block."""
    loss: float | None = None

    def work() -> tuple[list[tuple[Site, Entry]], Table]:
        nonlocal loss
        entries, loss = step.learn(program, table, block, arrivals, ctx)
        return list(entries.items()), table.put_all(entries)

    bar.begin(Site(block.at, "out"))
    after = visits.visit(table, [ctx.journal], work)
    bar.end(loss)
    return after


def _named(order: Sequence[Block]) -> str:
    return "blocks" if all(block.arms for block in order) else "blocks and layers"


def _tell_others(written: Written) -> None:
    if processes.count() > 1:
        processes.from_first(packed(written))


def _heard(program: Program, order: Sequence[Block], step: BlockLearner, ctx: PassContext) -> Table:
    """The table that the first process comes to, in another one."""
    table = program.table
    told_options([(step, ctx)], processes.agreed(1.0))
    for _ in order:
        table = taken(unpacked(processes.from_first(b""), program.device), table, [ctx.journal])
    return table


@dataclass(frozen=True, eq=False)
class _Plan:
    """The pass and its rows as a time budget wants them.

    Units: room in bytes for values that wait; seconds by block; factor as in `budget`.
    """

    step: BlockLearner
    chunks: Sequence[Chunk]
    room: int
    factor: float
    seconds: Sequence[float]


def _planned(
    program: Program,
    order: Sequence[Block],
    step: BlockLearner,
    ctx: PassContext,
    data: Calibration,
    factor: float | None,
    finished: int,
) -> _Plan:
    """The plan, said in one line; `factor` is given where a run had already settled it."""
    trial = _tried(program, order, step, ctx, data)

    def of(factor: float) -> tuple[int, int]:
        changed = scaled(step, factor)
        return min(changed.rows, len(data)), changed.iterations

    factor = settled(factor, ctx, lambda f: sum(trial.seconds(*of(f))))
    rows, iterations = of(factor)
    estimate = trial.estimate(rows, iterations, ctx.memory, finished)
    whole = sum(trial.seconds(rows, iterations))
    tell_plan(f"{step.name()} over {len(order)} {_named(order)}", estimate, [(step, ctx)], factor, whole)
    if trial.beside(rows) > ctx.memory:
        _log.warning(
            "that is more than the memory budget of %s: learning a block takes as much\n"
            "  mend: a smaller batch: or fewer rows: of the pass",
            megabytes(ctx.memory),
        )
    changed = scaled(step, factor)
    chunks = mixed(data, program, changed.rows, changed.batch, ctx.generator())
    seconds = trial.seconds(rows, iterations, finished)
    return _Plan(changed, chunks, trial.room(rows, ctx.memory), factor, seconds)


def _tried(
    program: Program, order: Sequence[Block], step: BlockLearner, ctx: PassContext, data: Calibration
) -> BlockTrial:
    """What the largest batch of rows costs."""
    chunk = max(
        mixed(data, program, step.rows, step.batch, ctx.generator()),
        key=lambda chunk: chunk.inputs["sample"].numel(),
    )

    def practice(
        program: Program, table: Table, block: Block, arrivals: Sequence[Arrival], iterations: int
    ) -> None:
        few = replace(step, iterations=iterations)  # type: ignore[type-var]  # passes are dataclasses
        few.learn(program, table, block, arrivals, replace(ctx, journal=Journal()))

    return BlockTrial.of(program, chunk, order, practice)
