"""One sweep of several passes: what it will take is said, then the walk, with what a run directory knows."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

from dmqfx import processes
from dmqfx.calibration.calibration import Calibration
from dmqfx.errors import CalibrationError
from dmqfx.graph.address import Site
from dmqfx.graph.program import Program
from dmqfx.graph.table import Entry, Table
from dmqfx.storage.codec import RECORDS
from dmqfx.sweep.estimate import tell
from dmqfx.sweep.finite import refuse_broken_weights
from dmqfx.sweep.key import key_of, of_table
from dmqfx.sweep.plan import Steps, planned
from dmqfx.sweep.progress import Progress
from dmqfx.sweep.run import NoRun, Written, running
from dmqfx.sweep.schedule import Schedule
from dmqfx.sweep.turn import Turn
from dmqfx.sweep.walk import Walk

__all__ = ["sweep"]

_log = logging.getLogger(__name__)


def sweep(program: Program, steps: Steps) -> Program:
    """The program with what the passes wrote, turn by turn, in its table.

    Raises: CalibrationError without calibration data, for data that do not fit, for values that are not
        finite, for a memory budget without room for one chunk; StoreError for a run directory or a disk.
    """
    ctx, schedule = steps[0][1], Schedule(program)
    refuse_broken_weights(program)
    data = _calibration(program, steps)
    with _run(program, data, steps) as run:
        visits = _Visits(run, schedule.sites)
        if visits.complete:
            return program.with_table(visits.replay(program.table, steps))
        plan = planned(program, schedule, data, steps, run.factor)
        run.begin(plan.factor)
        title = ", ".join(step.name() for step, _ in steps)
        with Progress(title, plan.seconds, shown=ctx.progress) as bar:
            walk = Walk(
                program, plan.chunks, memory=plan.room, total=plan.rows, seed=ctx.seed, folder=ctx.run_dir,
                gather=processes.gathered,
            )  # fmt: skip
            after = program.with_table(walk.run(partial(visits.visit, steps=plan.steps, bar=bar)))
        tell(title, bar.elapsed, sum(plan.seconds))
        processes.same("table", of_table(after.table))
        return after


class _Visits:
    """The turns of a sweep: those that a run directory knows are taken from there."""

    def __init__(self, run: NoRun, sites: Sequence[Site]) -> None:
        self._run = run
        known = run.finished(sites) if processes.is_first() else []
        number = int(processes.agreed(len(known)))
        self._done = known if processes.is_first() else run.finished(sites[:number])
        self._number = 0
        self.complete = len(self._done) == len(sites) > 0
        if self._done:
            _log.info("%d of %d tensors were finished before", len(self._done), len(sites))

    def replay(self, table: Table, steps: Steps) -> Table:
        """The table with the entries of all turns."""
        for written in self._done:
            table = _taken(written, table, steps)
        return table

    def visit(self, turn: Turn, steps: Steps, bar: Progress) -> Table:
        """The table after a turn."""
        number, self._number = self._number, self._number + 1
        bar.begin(turn.site)
        if number < len(self._done):
            turn.table = _taken(self._done[number], turn.table, steps)
        else:
            self._run.write(number, turn.site, _written(turn, steps))
        bar.end(turn.loss)
        return turn.table


def _written(turn: Turn, steps: Steps) -> Written:
    """Let every pass see the turn; an entry counts as soon as it is handed out."""
    entries: list[tuple[Site, Entry]] = []
    table = turn.table
    before = [(len(own.journal.applied), len(own.journal.refused)) for _, own in steps]
    for step, own in steps:
        for site, entry in step.visit(turn, own):
            turn.table = turn.table.put(site, entry)
            entries.append((site, entry))
    journals = [(own.journal, at) for (_, own), at in zip(steps, before, strict=True)]
    applied = tuple(tuple(journal.applied[start:]) for journal, (start, _) in journals)
    refused = tuple(tuple(journal.refused[start:]) for journal, (_, start) in journals)
    left = {(site, type(entry)) for site, entry in turn.table}
    gone = ((site, type(entry)) for site, entry in table if (site, type(entry)) not in left)
    dropped = tuple((site, kind.__name__) for site, kind in gone)
    return Written(tuple(entries), dropped, applied, refused)


def _taken(written: Written, table: Table, steps: Steps) -> Table:
    """The table with what a turn left, as if the passes had seen it now."""
    for (_, own), applied, refused in zip(steps, written.applied, written.refused, strict=True):
        own.journal.applied.extend(applied)
        own.journal.refused.extend(refused)
    for site, kind in written.dropped:
        table = table.drop(site, RECORDS[kind])
    for site, entry in written.entries:
        table = table.put(site, entry)
    return table


def _calibration(program: Program, steps: Steps) -> Calibration | None:
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


def _run(program: Program, data: Calibration | None, steps: Steps) -> AbstractContextManager[NoRun]:
    """The run directory's part for this sweep, if there is a directory and everything may be written."""
    ctx = steps[0][1]
    if ctx.run_dir is None or any(own.journal.fuel is not None for _, own in steps):
        return nullcontext(NoRun())
    names = "+".join(step.name() for step, _ in steps)
    settings = {"seed": ctx.seed, "chunk": ctx.chunk, "budget": ctx.budget}
    key = key_of(program, data, [step for step, _ in steps], settings)
    return running(ctx.run_dir, f"{len(program.log):02d}-{names}", key, program.device)
