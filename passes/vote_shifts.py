"""vote-shifts: channels whose numbers are small everywhere get steps that are finer by a power of two."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dmqfx.errors import CalibrationError, PipelineError
from dmqfx.globs import matcher
from dmqfx.graph.address import Site
from dmqfx.graph.facts import FITTED, FLAGGED, SHIFTED, Fact
from dmqfx.graph.pipeline import PassContext
from dmqfx.graph.program import Program
from dmqfx.graph.rewrite import Refuse
from dmqfx.graph.sites import fed_by_skip, is_weight
from dmqfx.graph.table import Entry, Planned, Shift
from dmqfx.numbers import effort
from dmqfx.numbers.quant import QParams
from dmqfx.numbers.speeds import Speeds
from dmqfx.numbers.voting import Ballot, step_errors
from dmqfx.runtime.operators import timestep_group
from dmqfx.sweep.sweep import SweepPass
from dmqfx.sweep.turn import Reader, Turn

EVERYWHERE = "**"


@dataclass(frozen=True)
class VoteShifts(SweepPass):
    """Write a Shift for each chosen input site: the step of a channel is the site's, or 1/2, 1/4, ... of it.

    Every calibration row votes for the step of least squared error over its positions, per channel and timestep
    group; a channel keeps the site's own step unless a share of at least `agree` of the rows wants one other.
    `mse` takes the step of least error over all rows instead. Chosen are the inputs that a long skip feeds, or
    with `where: all` every one, at addresses that fit `at`, a pattern as in a policy's rules. `shared` is one vote
    over all groups. The finest step is 1/2^largest of the site's.

    Source: DMQ, channel-wise power-of-two scaling with voting; the fallback is that of its code, not of its text.
    """

    requires: ClassVar[frozenset[Fact]] = frozenset({FLAGGED, FITTED})
    provides: ClassVar[frozenset[Fact]] = frozenset({SHIFTED})
    only_with: ClassVar[Mapping[str, tuple[str, tuple[str, ...]]]] = {"agree": ("method", ("vote",))}
    method: Literal["vote", "mse"] = "vote"
    where: Literal["skips", "all"] = "skips"
    at: str = EVERYWHERE
    agree: float = 0.85
    largest: int = 3
    shared: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.agree <= 1:
            raise ValueError(f"agree must be between 0 and 1, not {self.agree}")
        if not 1 <= self.largest <= 7:
            raise ValueError(f"largest must be from 1 to 7, not {self.largest}")
        matcher(self.at)

    def cost(self, program: Program, reader: Reader, values: float, speeds: Speeds) -> float:
        """Seconds of the errors of all steps, over all rows."""
        chosen = reader.spec is not None and self._chosen(program, reader.site)
        return effort.votes(speeds, values, self.largest) if chosen else 0.0

    def visit(self, turn: Turn, ctx: PassContext) -> Iterator[tuple[Site, Entry]]:
        """Hold the vote at each chosen reader.

        Raises: PipelineError if `at` fits none of the inputs that may be chosen; CalibrationError for numbers that
            are not finite.
        """
        self._check(turn)
        for reader in turn.readers:
            if reader.spec is None or not self._chosen(turn.program, reader.site):
                continue
            found = self._shift(turn, reader)
            if isinstance(found, Refuse):
                ctx.journal.refuse(reader.site, self.method, found.reason)
                if not ctx.journal.exhausted:  # this vote has the last word over one before
                    turn.table = turn.table.drop(reader.site, Shift)
            elif ctx.journal.apply(reader.site, self.method, _told(found)):
                yield reader.site, found

    def _check(self, turn: Turn) -> None:
        planned = [site for site, plan in turn.table.of(Planned).items() if plan.spec and not is_weight(site)]
        if self.at == EVERYWHERE or any(self._chosen(turn.program, site) for site in planned):
            return
        if any(map(self._fits, planned)):
            told = "fits no input that a long skip feeds\n  mend: where: all chooses other inputs, too"
        else:
            told = "fits no input that is to be quantized"
        raise PipelineError(f"vote-shifts: at: {self.at} {told}")

    def _chosen(self, program: Program, site: Site) -> bool:
        return (self.where == "all" or fed_by_skip(program, site)) and self._fits(site)

    def _fits(self, site: Site) -> bool:
        return any(map(matcher(self.at), site.at.names))

    def _shift(self, turn: Turn, reader: Reader) -> Shift | Refuse:
        params = turn.table.get(reader.site, QParams)
        if params is None:
            return Refuse("it has no scale yet; run fit-ranges before")
        if params.scale.shape[1] > 1:
            return Refuse("every channel has a scale of its own already")
        if float(params.scale.min()) / 2**self.largest < torch.finfo(params.scale.dtype).tiny:
            return Refuse("its steps are too small to be divided")
        exponent = self._exponent(turn, reader, params)
        if bool((exponent == self.largest).all()):
            return Refuse("no channel wants a finer step" + " by enough votes" * (self.method == "vote"))
        return Shift(exponent, self.largest)

    def _exponent(self, turn: Turn, reader: Reader, params: QParams) -> Tensor:
        """uint8 [G, C]."""
        ballot = self._counted(turn, reader, params)
        ballot = ballot.pooled() if self.shared else ballot
        found = ballot.elected(self.agree) if self.method == "vote" else ballot.least()
        return found.expand(len(params.scale), -1).contiguous()

    def _counted(self, turn: Turn, reader: Reader, params: QParams) -> Ballot:
        scale, zero_point, gamma = params.scale[:, 0], params.zero_point[:, 0], turn.gamma(reader)
        ballot = Ballot(len(scale), turn.channels, self.largest, scale.device)
        edges = torch.tensor(params.boundaries, device=scale.device)
        for batch in turn.batches:
            x = batch.quantized
            if gamma is not None:
                x = x / gamma.to(x).reshape([-1 if d == turn.axis % x.dim() else 1 for d in range(x.dim())])
            group = timestep_group(batch.timestep, edges)
            errors = step_errors(
                x, scale[group], zero_point[group], (params.qmin, params.qmax), turn.axis, self.largest
            )
            try:
                ballot.add(errors, group)
            except ValueError as error:
                raise CalibrationError(f"vote-shifts: {reader.site}: {error}") from error
        return ballot.joined(turn.batches.gather)


def _told(shift: Shift) -> str:
    finer = (shift.exponent < shift.largest).double().mean()
    return f"{float(finer):.0%} of the steps are finer"
