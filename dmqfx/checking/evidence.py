"""What the table claims, held against the policy and the calibration data that it is said to come from."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dmqfx.calibration.calibration import Calibration
from dmqfx.checking.faked import arguments, group_of
from dmqfx.checking.recount import miscounted
from dmqfx.checking.tablecheck import Broken
from dmqfx.graph.address import Site
from dmqfx.graph.facts import CALIBRATED, INTEGER, PLANNED, QDQ, SHIFTED
from dmqfx.graph.pipeline import Pass, PassContext
from dmqfx.graph.program import Program
from dmqfx.graph.sites import operations
from dmqfx.graph.table import Planned, Range
from dmqfx.policy.policy import resolve

__all__ = ["contradictions"]

_ROWS = 8
_SLACK = 1e-4  # of the width of a range
_ROUNDINGS = 20  # of the tensor's greatest value: sums in another order differ in their last digits


def contradictions(before: Program, after: Program, step: Pass, ctx: PassContext) -> Iterator[Broken]:
    """Entries that a pass wrote, or left, against the policy or the calibration rows."""
    if PLANNED in after.facts - before.facts and ctx.policy is not None:
        yield from _plan(after, ctx)
    if SHIFTED in step.provides:
        yield from miscounted(after, step, ctx)
    if ctx.calibration is None or CALIBRATED not in after.facts or {QDQ, INTEGER} & after.facts:
        return
    if CALIBRATED not in before.facts:
        yield from _ranges(after, ctx.calibration, tight=True)
    elif after.gm is not before.gm:
        yield from _ranges(after, ctx.calibration.select(_ROWS, ctx.generator()), tight=False)


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


def _ranges(program: Program, calibration: Calibration, *, tight: bool) -> Iterator[Broken]:
    """Sites that read values outside their range; if `tight`, also ranges that end where no value does."""
    ranges = program.table.of(Range)
    for site, (low, high) in _measured(program, calibration, ranges).items():
        seen = ranges[site]
        rows = torch.isfinite(low).all(1)  # the groups that any row fell into
        low, high, was_low, was_high = (t[rows].double() for t in (low, high, seen.low, seen.high))
        greatest = torch.maximum(was_low.abs(), was_high.abs()).amax(1, keepdim=True)
        slack = _SLACK * (was_high - was_low) + _ROUNDINGS * torch.finfo(program.dtype).eps * greatest
        beyond = torch.maximum(was_low - low, high - was_high) > slack
        inside = torch.maximum(low - was_low, was_high - high) > slack
        if bool(beyond.any()):
            group, channel = _first(beyond, rows)
            yield Broken(site, "Range", f"channel {channel} of group {group} takes values beyond it")
        elif tight and bool(inside.any()):
            group, channel = _first(inside, rows)
            yield Broken(site, "Range", f"no value of channel {channel} of group {group} reaches its ends")


def _measured(
    program: Program, calibration: Calibration, ranges: dict[Site, Range]
) -> dict[Site, tuple[Tensor, Tensor]]:
    """Least and greatest value per group and channel, infinite where no row fell."""
    found: dict[Site, tuple[Tensor, Tensor]] = {}
    for batch in calibration.batches(_ROWS, program.inputs, dtype=program.dtype):
        inputs = {name: value.to(program.device) for name, value in batch.items()}
        for site, x in arguments(program, inputs, set(ranges)).items():
            seen = ranges[site]
            rows = x.movedim(seen.axis, 1).flatten(2) if x.dim() > 2 else x[:, :, None]
            group = group_of(inputs["timestep"], seen.boundaries)
            low, high = (torch.full(seen.low.shape, end, device=x.device) for end in (torch.inf, -torch.inf))
            for g in sorted(set(group.tolist())):
                low[g], high[g] = rows[group == g].amin((0, 2)), rows[group == g].amax((0, 2))
            known = found.get(site, (low, high))
            found[site] = torch.minimum(known[0], low), torch.maximum(known[1], high)
    return found


def _first(where: Tensor, rows: Tensor) -> tuple[int, int]:
    """(group, channel) of the first hit, the group counted among all groups."""
    row, channel = where.nonzero()[0].tolist()
    return int(rows.nonzero().flatten()[row]), channel
