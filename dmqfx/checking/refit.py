"""Fitted ranges judged anew, by plain arithmetic, on what the quantized network makes of the calibration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from itertools import product

import torch
from torch import Tensor

from dmqfx.checking.faked import fake, group_of
from dmqfx.checking.grids import finest
from dmqfx.checking.seen import Seen
from dmqfx.checking.tablecheck import Broken
from dmqfx.graph.pipeline import Pass, PassContext
from dmqfx.graph.program import Program
from dmqfx.graph.table import Range, Table
from dmqfx.numbers.quant import QParams
from dmqfx.sweep.chunks import chunked
from dmqfx.sweep.turn import Reader, Turn
from dmqfx.sweep.walk import Walk

__all__ = ["misfitted"]

_SHARES = (1.0, 0.6)  # of the range, for either end: the whole, and what a search would hardly miss
_WORSE = 1.25  # squared error: a search of a histogram was up to 1.06 times worse on the bundled model
_ROWS, _VALUES = 8192, 2**22  # output positions; values looked at together


def misfitted(before: Program, program: Program, step: Pass, ctx: PassContext) -> Iterator[Broken]:
    """Ranges that are not those of the calibration rows, and parameters (`mse`) that are clearly not the best.

    They are compared with other parts of the range, and all of it, on the output positions that the pass looked at.
    Ranges that were there before the pass are not its own to answer for.

    A budget of time has the pass look at fewer rows; then nothing is said.
    """
    if ctx.calibration is None or ctx.budget is not None:
        return
    rows, eps, found = getattr(step, "rows", _ROWS), torch.finfo(program.dtype).eps, list[Broken]()

    def visit(turn: Turn) -> Table:
        for reader in turn.readers:
            seen, params = turn.table.get(reader.site, Range), turn.table.get(reader.site, QParams)
            if reader.spec is None or seen is None:
                continue
            if seen is not before.table.get(reader.site, Range):
                for reason in _arriving(turn, seen).against(seen, eps, exactly=True):
                    found.append(Broken(reader.site, "Range", reason))
            if params is None or reader.spec.range != "mse":
                continue
            for group in _beaten(turn, reader, seen, params, rows):
                reason = f"timestep group {group} is rounded worse than in another part of its range"
                found.append(Broken(reader.site, "QParams", reason))
        return turn.table

    chunks = chunked(ctx.calibration, program, ctx.chunk)
    Walk(program, chunks, memory=ctx.memory, total=len(ctx.calibration), seed=ctx.seed).run(visit)
    yield from found


def _arriving(turn: Turn, claimed: Range) -> Seen:
    """What the quantized network makes of the turn's tensor, in the groups of a range."""
    groups = len(claimed.boundaries) + 1
    return reduce(
        Seen.merge,
        (
            Seen.of(each.quantized, group_of(each.timestep, claimed.boundaries), turn.axis, groups)
            for each in turn.batches
        ),
    )


def _beaten(turn: Turn, reader: Reader, seen: Range, params: QParams, count: int) -> list[int]:
    """The timestep groups in which a candidate has a clearly lesser error."""
    gamma = turn.gamma(reader)
    low, high = (
        end.double() if gamma is None else end.double() / gamma.double() for end in (seen.low, seen.high)
    )
    low, high = low.amin(1, keepdim=True), high.amax(1, keepdim=True)
    others = [finest(low * lower, high * upper, params) for lower, upper in product(_SHARES, repeat=2)]
    ours, *theirs = _errors(turn, reader, [params, *others], count)
    worse = ours > _WORSE * torch.stack(theirs).amin(0)
    return [int(group) for group in worse.nonzero().flatten()]


def _errors(turn: Turn, reader: Reader, grids: Sequence[QParams], count: int) -> list[Tensor]:
    """Squared error of each grid by timestep group, weighed by what the layer makes of each column.

    Shapes: float64 [G] each.
    """
    rows, gamma, felt = turn.rows(reader, count), turn.gamma(reader), turn.felt(reader)
    weight = rows.quantized.new_ones(rows.quantized.shape[1]) if felt is None else felt
    totals = [torch.zeros(len(grid.scale), dtype=torch.float64, device=weight.device) for grid in grids]
    height = max(1, _VALUES // len(weight))
    for x, timestep in zip(
        torch.split(rows.quantized, height), torch.split(rows.timestep, height), strict=True
    ):
        if gamma is not None:
            x = x / gamma.to(x).repeat_interleave(rows.taps)
        group = group_of(timestep, grids[0].boundaries)
        for total, grid in zip(totals, grids, strict=True):
            total.index_add_(0, group, (fake(x, grid, group) - x).double().square() @ weight.double())
    return totals
