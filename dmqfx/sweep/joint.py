"""One sweep of several passes: what it will take is said, then the walk, with what a run directory knows."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from dmqfx import processes
from dmqfx.graph.address import Site
from dmqfx.graph.program import Program
from dmqfx.graph.table import Entry, Table
from dmqfx.machine import give_back_memory
from dmqfx.sweep.estimate import tell
from dmqfx.sweep.finite import refuse_broken_weights
from dmqfx.sweep.key import of_table
from dmqfx.sweep.plan import Steps, calibration_for, planned
from dmqfx.sweep.progress import Progress
from dmqfx.sweep.run import NoRun, Written
from dmqfx.sweep.schedule import Schedule
from dmqfx.sweep.turn import Turn
from dmqfx.sweep.visits import Visits, kept
from dmqfx.sweep.walk import Walk

__all__ = ["sweep"]


def sweep(program: Program, steps: Steps) -> Program:
    """The program with what the passes wrote, turn by turn, in its table.

    Raises: CalibrationError without calibration data, for data that do not fit, for values that are not
        finite, for a memory budget without room for one chunk; StoreError for a run directory or a disk.
    """
    ctx, schedule = steps[0][1], Schedule(program)
    refuse_broken_weights(program)
    data = calibration_for(program, steps)
    with kept(program, data, steps) as run:
        visits = Visits(run, schedule.sites, _done(run, schedule.sites))
        if visits.complete:
            return program.with_table(visits.replay(program.table, [own.journal for _, own in steps]))
        plan = planned(program, schedule, data, steps, run.factor)
        run.begin(plan.factor)
        title = ", ".join(step.name() for step, _ in steps)
        with Progress(title, plan.seconds, shown=ctx.progress) as bar:
            walk = Walk(
                program, plan.chunks, memory=plan.room, working=plan.working, total=plan.rows, seed=ctx.seed,
                folder=ctx.run_dir, gather=processes.gathered,
            )  # fmt: skip
            after = program.with_table(walk.run(partial(_visited, visits=visits, steps=plan.steps, bar=bar)))
        tell(title, bar.elapsed, sum(plan.seconds))
        processes.same("table", of_table(after.table))
        return after


def _done(run: NoRun, sites: Sequence[Site]) -> list[Written]:
    """The turns that need not be done again, as the first process knows them."""
    known = run.finished(sites) if processes.is_first() else []
    number = int(processes.agreed(len(known)))
    return known if processes.is_first() else run.finished(sites[:number])


def _visited(turn: Turn, visits: Visits, steps: Steps, bar: Progress) -> Table:
    """The table after a turn."""
    bar.begin(turn.site)
    work = partial(_seen, turn, steps)
    turn.table = visits.visit(turn.table, [own.journal for _, own in steps], work)
    give_back_memory()
    bar.end(turn.loss)
    return turn.table


def _seen(turn: Turn, steps: Steps) -> tuple[list[tuple[Site, Entry]], Table]:
    """Let every pass see the turn; an entry counts as soon as it is handed out."""
    entries: list[tuple[Site, Entry]] = []
    for step, own in steps:
        for site, entry in step.visit(turn, own):
            turn.table = turn.table.put(site, entry)
            entries.append((site, entry))
    return entries, turn.table
