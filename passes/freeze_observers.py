"""freeze-observers: run the calibration through the observers and keep what they saw as Range entries."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import ClassVar

import torch
from tqdm import tqdm

from dmqfx import processes
from dmqfx.calibration.calibration import Calibration
from dmqfx.errors import CalibrationError
from dmqfx.graph.address import Site
from dmqfx.graph.facts import CALIBRATED, FITTED, OBSERVED, SHIFTED, Fact
from dmqfx.graph.pipeline import Pass, PassContext, Preserves
from dmqfx.graph.program import Program
from dmqfx.graph.rewrite import Rewriter
from dmqfx.graph.sites import readers
from dmqfx.graph.table import Range, Shift
from dmqfx.numbers.observers import Observer
from dmqfx.numbers.quant import QParams
from dmqfx.sweep.chunks import own_rows, shared
from dmqfx.sweep.finite import refuse_overflow
from dmqfx.sweep.streaming import streamed

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FreezeObservers(Pass):
    """observe(x)  ->  x, with the Range of x in the table for every site that read the observer.

    Units: batch is the number of calibration rows per call of the UNet.
    """

    requires: ClassVar[frozenset[Fact]] = frozenset({OBSERVED})
    provides: ClassVar[frozenset[Fact]] = frozenset({CALIBRATED})
    clears: ClassVar[frozenset[Fact]] = frozenset({OBSERVED, FITTED, SHIFTED})
    preserves: ClassVar[Preserves] = Preserves.BITWISE
    batch: int = 8

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"batch must be at least 1, not {self.batch}")

    def run(self, program: Program, ctx: PassContext) -> Program:
        """Stream the calibration once; statistics are kept, activations are not.

        Raises: CalibrationError without calibration, for rows that do not fit, for values not finite, naming the
            first operation.
        """
        if ctx.calibration is None:
            raise CalibrationError(
                "freeze-observers needs calibration data; pass calibration= or let compile make one"
            )
        ctx.calibration.check(program.inputs)
        rw = Rewriter(program, self.name(), ctx.journal)
        self._observe(rw.finish(), ctx)
        table = program.table
        for node in [n for n in rw.graph.nodes if n.op == "call_module"]:
            observer = rw.module(node)
            if not isinstance(observer, Observer) or not ctx.journal.apply(node.meta["address"], "freeze"):
                continue
            sites = [Site(user.meta["address"], arg) for user, arg in readers(node)]
            observer.join(processes.gathered)
            seen = _result(observer, program, ctx.calibration)
            table = table.put_all(dict.fromkeys(sites, seen))
            for site in sites:  # parameters of the range before
                table = table.drop(site, QParams).drop(site, Shift)
            rw.replace(node, node.all_input_nodes[0])
        _warn_of_gaps(table.of(Range))
        return rw.finish().with_table(table)

    def _observe(self, program: Program, ctx: PassContext) -> None:
        assert ctx.calibration is not None  # run looked
        quiet = not ctx.progress
        with (
            torch.no_grad(),
            tqdm(total=own_rows(ctx.calibration), desc="observe", unit="row", disable=quiet) as bar,
        ):
            every = ctx.calibration.batches(self.batch, program.inputs, dtype=program.dtype)
            batches = shared(every, ctx.calibration, self.batch)
            for batch in streamed(batches, own_rows(ctx.calibration), self.name()):
                program(**{name: value.to(program.device) for name, value in batch.items()})
                bar.update(len(batch["sample"]))


def _result(observer: Observer, program: Program, data: Calibration) -> Range:
    """What an observer saw. Of what is not finite it is not the one to blame: the first operation is."""
    try:
        return observer.result()
    except CalibrationError:
        refuse_overflow(program, data)
        raise


def _warn_of_gaps(ranges: dict[Site, Range]) -> None:
    """Say once which timestep groups no calibration row fell into."""
    for boundaries in {seen.boundaries for seen in ranges.values()}:
        counts = next(seen.count for seen in ranges.values() if seen.boundaries == boundaries)
        empty = [g for g, count in enumerate(counts.tolist()) if count == 0]
        if empty:
            logger.warning(
                "%d of %d timestep groups have no calibration row (%s); they take the nearest group's ranges",
                len(empty), len(counts), ", ".join(map(str, empty)),
            )  # fmt: skip
