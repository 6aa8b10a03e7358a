"""What the table claims, held against the policy and the calibration data that it is said to come from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from dmqfx.calibration.calibration import Calibration
from dmqfx.checking.means import uncorrected
from dmqfx.checking.recount import miscounted
from dmqfx.checking.refit import misfitted
from dmqfx.checking.seen import seen_at
from dmqfx.checking.tablecheck import Broken
from dmqfx.checking.unevenness import misjudged
from dmqfx.graph.address import Site
from dmqfx.graph.facts import CALIBRATED, CORRECTED, FITTED, FLAGGED, PLANNED, SHIFTED
from dmqfx.graph.pipeline import Pass, PassContext
from dmqfx.graph.program import Program
from dmqfx.graph.sites import operations
from dmqfx.graph.table import Planned, Range
from dmqfx.policy.policy import resolve

__all__ = ["contradictions"]

_ROWS = 8


def contradictions(before: Program, after: Program, step: Pass, ctx: PassContext) -> Iterator[Broken]:
    """Entries that a pass wrote against the policy or the calibration rows."""
    if PLANNED in step.provides and ctx.policy is not None:
        yield from _plan(after, ctx)
    if SHIFTED in step.provides:
        yield from miscounted(after, step, ctx)
    if FITTED in step.provides:
        yield from misfitted(before, after, step, ctx)
    if ctx.calibration is None:
        return
    if CORRECTED in step.provides:
        yield from uncorrected(after, ctx)
    if FLAGGED in step.provides:
        rows = getattr(step, "rows", len(ctx.calibration))  # a pass may measure on fewer, and then says so
        yield from misjudged(after, ctx.calibration.select(rows, ctx.generator()))
    ranges, known = after.table.of(Range), before.table.of(Range)
    if CALIBRATED in step.provides:
        yield from _ranges(after, ctx.calibration, ranges, exactly=True)
    elif FITTED not in step.provides and (
        new := {site: found for site, found in ranges.items() if site not in known}
    ):
        few = ctx.calibration.select(_ROWS, ctx.generator())
        yield from _ranges(after, few, new, exactly=False)


def _plan(program: Program, ctx: PassContext) -> Iterator[Broken]:
    """Sites whose plan is not what the policy resolves to, though no refusal says why."""
    assert ctx.policy is not None  # the caller looked
    refused = {(r.at, r.rule.rpartition(" ")[2]) for r in ctx.journal.refused}
    wanted = resolve(ctx.policy, operations(program), ctx.train_timesteps)
    for site, asked in wanted.items():
        got = program.table.get(site, Planned)
        if got == asked or (site.at, site.arg) in refused:
            continue
        words = "nothing" if got is None else f"{got.spec or 'float'} by {got.rule}"
        yield Broken(
            site,
            "Planned",
            f"the policy asks for {asked.spec or 'float'} by {asked.rule}, planned is {words}",
        )


def _ranges(
    program: Program, calibration: Calibration, ranges: Mapping[Site, Range], *, exactly: bool
) -> Iterator[Broken]:
    """Ranges that calibration rows leave, or (`exactly`) that are not made from just these rows."""
    batches = (
        {name: value.to(program.device) for name, value in batch.items()}
        for batch in calibration.batches(_ROWS, program.inputs, dtype=program.dtype)
    )
    for site, seen in seen_at(program, batches, ranges).items():
        for reason in seen.against(ranges[site], torch.finfo(program.dtype).eps, exactly=exactly):
            yield Broken(site, "Range", reason)
