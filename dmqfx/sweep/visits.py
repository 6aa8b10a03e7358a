"""The turns of a sweep one after the other: those that a run directory knows are taken from there."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypeAlias

from dmqfx import processes
from dmqfx.calibration.calibration import Calibration
from dmqfx.graph.address import Site
from dmqfx.graph.journal import Journal
from dmqfx.graph.program import Program
from dmqfx.graph.table import Entry, Table
from dmqfx.storage.codec import RECORDS
from dmqfx.sweep.key import key_of
from dmqfx.sweep.plan import Passes
from dmqfx.sweep.run import NoRun, Written, running

__all__ = ["Visits", "Work", "kept", "taken"]

Work: TypeAlias = Callable[[], tuple[Sequence[tuple[Site, Entry]], Table]]
"""Does a turn: the entries that it wrote, in their order, and the table after it."""

_log = logging.getLogger(__name__)


class Visits:
    """Turns of known sites. `done` were finished before; `told` hears of every turn when it is over."""

    def __init__(
        self,
        run: NoRun,
        sites: Sequence[Site],
        done: Sequence[Written],
        *,
        what: str = "tensors",
        told: Callable[[Written], None] = lambda written: None,
    ) -> None:
        self._run, self._sites, self._done, self._told = run, sites, done, told
        self._number = 0
        self.complete = len(done) == len(sites) > 0
        if done:
            _log.info("%d of %d %s were finished before", len(done), len(sites), what)

    def replay(self, table: Table, journals: Sequence[Journal]) -> Table:
        """The table with the entries of all turns that were finished before."""
        for written in self._done:
            table = taken(written, table, journals)
            self._told(written)
        return table

    def visit(self, table: Table, journals: Sequence[Journal], work: Work) -> Table:
        """The table after the next turn; it is done if it was not before, and kept."""
        number, self._number = self._number, self._number + 1
        if number < len(self._done):
            after, written = taken(self._done[number], table, journals), self._done[number]
        else:
            after, written = _worked(table, journals, work)
            self._run.write(number, self._sites[number], written)
        self._told(written)
        return after


def _worked(table: Table, journals: Sequence[Journal], work: Work) -> tuple[Table, Written]:
    before = [(len(journal.applied), len(journal.refused)) for journal in journals]
    entries, after = work()
    marked = list(zip(journals, before, strict=True))
    applied = tuple(tuple(journal.applied[start:]) for journal, (start, _) in marked)
    refused = tuple(tuple(journal.refused[start:]) for journal, (_, start) in marked)
    return after, Written(tuple(entries), tuple(_dropped(table, after)), applied, refused)


def _dropped(table: Table, after: Table) -> Iterator[tuple[Site, str]]:
    left = {(site, type(entry)) for site, entry in after}
    return ((site, type(entry).__name__) for site, entry in table if (site, type(entry)) not in left)


def taken(written: Written, table: Table, journals: Sequence[Journal]) -> Table:
    """The table with what a turn left, as if the passes had seen it now."""
    for journal, applied, refused in zip(journals, written.applied, written.refused, strict=True):
        journal.applied.extend(applied)
        journal.refused.extend(refused)
    for site, kind in written.dropped:
        table = table.drop(site, RECORDS[kind])
    for site, entry in written.entries:
        table = table.put(site, entry)
    return table


def kept(
    program: Program, data: Calibration | None, steps: Passes, *, own: bool = False
) -> AbstractContextManager[NoRun]:
    """The run directory's part for passes, if there is a directory and everything may be written.

    Where processes keep states of their `own`, another number of processes is another run.
    """
    ctx = steps[0][1]
    if ctx.run_dir is None or any(each.journal.fuel is not None for _, each in steps):
        return nullcontext(NoRun())
    names = "+".join(step.name() for step, _ in steps)
    settings = {
        "seed": ctx.seed,
        "chunk": ctx.chunk,
        "budget": None if ctx.budget is None else ctx.budget.seconds,
    }
    key = key_of(program, data, [step for step, _ in steps], settings)
    if own:
        key["numbers of processes"] = str(processes.count())
    return running(ctx.run_dir, f"{len(program.log):02d}-{names}", key, program.device)
