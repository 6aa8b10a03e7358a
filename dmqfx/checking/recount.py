"""The vote on shifts counted anew, by plain arithmetic, on what the quantized network makes of the calibration."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dmqfx.checking.faked import fake, group_of
from dmqfx.checking.tablecheck import Broken
from dmqfx.graph.pipeline import Pass, PassContext
from dmqfx.graph.program import Program
from dmqfx.graph.table import Shift, Table
from dmqfx.numbers.quant import QParams
from dmqfx.sweep.chunks import chunked
from dmqfx.sweep.turn import Batch, Reader, Turn
from dmqfx.sweep.walk import Walk

__all__ = ["miscounted"]

_NEAR = 1e-6  # relative: errors that another order of summing may exchange


def miscounted(program: Program, step: Pass, ctx: PassContext) -> Iterator[Broken]:
    """Shifts that are not what the calibration rows elect, and sites where they elect one that was refused.

    Only for a pass that says by which rule they do: `agree`, `largest`, and perhaps `method` and `shared`.
    """
    agree, largest = getattr(step, "agree", None), getattr(step, "largest", None)
    if ctx.calibration is None or not isinstance(agree, (int, float)) or not isinstance(largest, int):
        return
    by_error = getattr(step, "method", "vote") == "mse"
    rule = _Rule(by_error, float(agree), bool(getattr(step, "shared", False)))
    refused = {refusal.at for refusal in ctx.journal.refused}
    chunks = chunked(ctx.calibration, program, ctx.chunk)
    found: list[Broken] = []

    def visit(turn: Turn) -> Table:
        for reader in turn.readers:
            params, shift = turn.table.get(reader.site, QParams), turn.table.get(reader.site, Shift)
            if params is None or (shift is None and not (reader.site.at in refused and _divisible(params))):
                continue
            shift = shift or _unshifted(turn, params, largest)
            for group, channel in _wrong(rule, turn, reader, params, shift):
                exponent = int(shift.exponent[group, channel])
                reason = f"rows do not elect exponent {exponent} for channel {channel} of group {group}"
                found.append(Broken(reader.site, "Shift", reason))
        return turn.table

    Walk(program, chunks, memory=ctx.memory, total=len(ctx.calibration)).run(visit)
    yield from found


def _divisible(params: QParams) -> bool:
    """Whether a shift is possible at all: one step for the tensor, and not among the least of its dtype."""
    return (
        params.scale.shape[1] == 1 and float(params.scale.min()) > 1e3 * torch.finfo(params.scale.dtype).tiny
    )


def _unshifted(turn: Turn, params: QParams, largest: int) -> Shift:
    """What a refusal claims: that every channel keeps the site's own step."""
    shape = (len(params.scale), turn.channels)
    return Shift(torch.full(shape, largest, dtype=torch.uint8), largest)


@dataclass(frozen=True)
class _Rule:
    """How rows decide: by least error or by votes; how many must agree; whether groups decide together."""

    by_error: bool
    agree: float
    together: bool

    def allows(self, errors: Tensor, exponent: int) -> bool:
        """Whether rows may elect an exponent, either way where steps are as good as each other.

        Shapes: errors [n, largest + 1].
        """
        if self.by_error:
            total = errors.sum(0)
            return bool(total[exponent] <= total.min() * (1 + _NEAR))
        near = errors <= errors.amin(1, keepdim=True) * (1 + _NEAR)
        alone = near & (near.sum(1, keepdim=True) == 1)
        enough = self.agree * len(errors)
        if exponent < errors.shape[1] - 1:
            return bool(near[:, exponent].sum() >= max(enough, int(alone.sum(0).max())))
        return not bool((alone[:, :-1].sum(0) >= enough).any()) or bool(
            near[:, -1].sum() >= alone[:, :-1].sum(0).max()
        )


def _wrong(
    rule: _Rule, turn: Turn, reader: Reader, params: QParams, shift: Shift
) -> Iterator[tuple[int, int]]:
    """(group, channel) of exponents that the rule does not allow; groups without rows are not looked at."""
    parts: dict[int, list[Tensor]] = {}
    for batch in turn.batches:
        groups = group_of(batch.timestep, params.boundaries).tolist()
        for group, errors in zip(groups, _errors(turn, reader, params, shift, batch), strict=True):
            parts.setdefault(group, []).append(errors)
    everything = torch.stack([each for part in parts.values() for each in part])
    for group, part in sorted(parts.items()):
        errors = everything if rule.together else torch.stack(part)
        for channel, exponent in enumerate(shift.exponent[group].tolist()):
            if not rule.allows(errors[:, channel], exponent):
                yield group, channel


def _errors(turn: Turn, reader: Reader, params: QParams, shift: Shift, batch: Batch) -> Tensor:
    """Mean squared error of each step of each row's channels.

    Shapes: float64 [B, C, largest + 1].
    """
    x, gamma = batch.quantized.double().movedim(turn.axis, 1), turn.gamma(reader)
    x = x.reshape(*x.shape[:2], -1)
    if gamma is not None:
        x = x / gamma.double()[None, :, None]
    group = group_of(batch.timestep, params.boundaries) if params.boundaries else None
    halvings = range(shift.largest, -1, -1)
    candidates = [replace(params, scale=params.scale.double() * 0.5**k) for k in halvings]
    return torch.stack([(fake(x, each, group) - x).square().mean(2) for each in candidates], 2)
