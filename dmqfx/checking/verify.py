"""verify: run one pass and see that it kept what it promised, or find the application that did not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from dmqfx.checking.attended import Attended
from dmqfx.checking.culprit import find_culprit
from dmqfx.checking.evidence import contradictions
from dmqfx.checking.headroom import Headroom
from dmqfx.checking.judges import Close, Equal, Finding, Judge, Planlike, SameCodes, Signal, Together
from dmqfx.checking.ledger import unaccounted
from dmqfx.checking.lookups import EveryRow
from dmqfx.checking.probes import at_edges, draw, strong
from dmqfx.checking.producers import wrong_producers
from dmqfx.checking.repeats import Repeated
from dmqfx.checking.tablecheck import Broken, broken_claims
from dmqfx.errors import DmqfxError, VerifyError
from dmqfx.graph.facts import ATTENDED, FITTED, INTEGER, PAIRED, QDQ
from dmqfx.graph.fingerprint import fingerprint, refuse_changes
from dmqfx.graph.invariants import check_facts, check_structure
from dmqfx.graph.journal import Application, Journal
from dmqfx.graph.pipeline import (
    Observe,
    Pass,
    PassContext,
    Preserves,
    check_declared,
)
from dmqfx.graph.program import Program
from dmqfx.seeing.given import Seen, program_of

__all__ = ["Verdict", "checking", "error_after", "verify"]

_SIGNAL_ROWS = 4


@dataclass(frozen=True)
class Verdict:
    """What was measured of a pass that kept its promise.

    Units: error and limit are relative L2 distances of the outputs, in float64 where there was a twin. For a
    lossy pass they are noise over signal.
    """

    step: str
    preserves: Preserves
    limit: float
    error: float
    probes: int

    @property
    def sqnr_db(self) -> float:
        """The error as a signal-to-noise ratio in dB."""
        return math.inf if self.error == 0 else -20 * math.log10(self.error)


def verify(program: Seen, step: Pass, ctx: PassContext | None = None, *, float64: bool = True) -> Verdict:
    """Run a pass on a program and compare with before: the outputs, the codes, and what the table claims.

    Without `float64` nothing is checked on a float64 twin: for programs that leave no room for one.

    Raises: VerifyError naming the step, the rule and the address at fault; RewriteError for a broken graph;
        PipelineError for what is no pass, or does not say what it preserves; NotAProgramError.
    Example:
        >>> from diffusers import UNet2DModel
        >>> from dmqfx.frontend.capture import capture
        >>> from dmqfx.graph.registry import create
        >>> blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
        >>> unet = UNet2DModel(8, block_out_channels=(4,), norm_num_groups=2, add_attention=False, **blocks)
        >>> verify(capture(unet), create("canonicalize")).error
        0.0
    """
    program = program_of(program, "verify")
    check_declared(step)
    before = fingerprint(program)
    verdict = _verify(program, step, ctx or PassContext(), None, float64)
    refuse_changes(program, before, step.name())
    return verdict


def checking(*, float64: bool = True) -> Observe:
    """What `Pipeline.run(observe=...)` takes to verify every pass; the error becomes the drift in the log."""

    def observe(step: Pass, before: Program, after: Program, ctx: PassContext) -> float | None:
        return _verify(before, step, ctx, after, float64).error

    return observe


def error_after(
    program: Program,
    step: Pass,
    ctx: PassContext | None = None,
    *,
    fuel: int | None = None,
    float64: bool = True,
) -> float:
    """The error that the first `fuel` applications of a pass make, as `verify` measures it."""
    trials = _trials(program, step, ctx or PassContext(), float64)
    findings = [t.look(fuel)[0] for t in [t for t in trials if t.twin == float64] or trials]
    return next((finding for finding in findings if finding.wrong), findings[0]).error


@dataclass(frozen=True)
class _Trial:
    """One program, looked at by one judge before and after the pass."""

    program: Program
    step: Pass
    ctx: PassContext
    judge: Judge
    twin: bool

    def look(
        self, fuel: int | None = None, after: Program | None = None
    ) -> tuple[Finding, tuple[Application, ...]]:
        """The judge's finding after so many applications, and what was applied."""
        applied = self.ctx.journal.applied
        if after is None:
            after, journal = self._run(fuel)
            applied = journal.applied
        try:
            return self.judge.judge(after), tuple(applied)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            gist = str(error).strip().splitlines()[0][:200]
            return Finding(math.inf, 0.0, f"the program does not run any more ({gist})"), tuple(applied)

    def _run(self, fuel: int | None) -> tuple[Program, Journal]:
        try:
            return _run(self.step, self.program, self.ctx, fuel)
        except (RuntimeError, TypeError) as error:
            if not self.twin:
                raise
            gist = str(error).strip().splitlines()[0][:200]
            what = f"does not run on a float64 twin ({gist})"
            raise VerifyError(what, step=self.step.name(), mend="verify(..., float64=False)") from error

    def refute(self, finding: Finding, applied: Sequence[Application]) -> VerifyError:
        """The error for a wrong finding, with the application at fault."""
        dtype = str(self.program.dtype).removeprefix("torch.")
        numbers = f": {finding.error:.3g}, limit {finding.limit:.3g}" if finding.error < math.inf else ""
        what = f"{finding.what}, in {dtype}{numbers}"
        if finding.at:
            rule = _rule_at(finding.at, applied)
            return _error(self.step, what, finding, rule, finding.at, None, self._again(None))
        culprit = find_culprit(self._wrong_after, len(applied))
        if culprit.number == 0:
            why = "wrong before any application in its journal: the pass changes more than it records\n"
            return _error(self.step, what, finding, "", "", 0, f"{why}  {self._again(0)}")
        guilty, number = applied[culprit.number - 1], culprit.number
        words = f" ({guilty.what})" if guilty.what else ""
        where = f"application {number} of {len(applied)}{words}, found in {culprit.runs} runs of the pass\n"
        mend = f"{where}  {self._again(number)}"
        return _error(self.step, what, finding, guilty.rule, str(guilty.at), number, mend)

    def _wrong_after(self, fuel: int) -> bool:
        try:
            return self.look(fuel)[0].wrong
        except DmqfxError:  # a prefix that does not even stand
            return True

    def _again(self, fuel: int | None) -> str:
        fuelled = "" if fuel is None else f"fuel={fuel}, "
        return (
            "see it again: from dmqfx.checking.verify import error_after; "
            f"error_after(program, step, ctx, {fuelled}float64={self.twin})"
        )


def _verify(program: Program, step: Pass, ctx: PassContext, after: Program | None, float64: bool) -> Verdict:
    trials = _trials(program, step, ctx, float64)
    if after is None:
        after, journal = _run(step, program, ctx, None)
        ctx = replace(ctx, journal=journal)
    for broken in broken_claims(after):
        raise _refute_claim(step, broken, ctx.journal)
    check_facts(after, step.name())
    findings = []
    for trial in trials:
        finding, applied = replace(trial, ctx=ctx).look(after=after if trial.program is program else None)
        if finding.wrong:
            raise trial.refute(finding, applied)
        findings.append(finding)
    for broken in _unfounded(program, after, step, ctx):
        raise _refute_claim(step, broken, ctx.journal)
    first = findings[0]
    return Verdict(
        step.name(), step.preserves, first.limit, first.error, sum(len(t.judge.probes) for t in trials)
    )


def _unfounded(before: Program, after: Program, step: Pass, ctx: PassContext) -> Iterator[Broken]:
    """Entries that do not come from where they say, one reason after the other."""
    yield from unaccounted(before, after, step, ctx.journal)
    yield from contradictions(before, after, step, ctx)
    if PAIRED in step.provides:
        yield from wrong_producers(after, draw(after, ctx.generator())[0])


def _trials(program: Program, step: Pass, ctx: PassContext, float64: bool) -> list[_Trial]:
    """The programs to look at and their judges, the float64 twin first (last for a lossy pass)."""
    if step.preserves is Preserves.LOSSY:
        signal = _Trial(program, step, ctx, Signal(program, _rows(program, ctx), _floor(ctx)), False)
        attended = partial(Attended, bits=getattr(step, "bits", 8))
        opinions = ((QDQ, Planlike), (ATTENDED, attended))
        seconds = [kind for fact, kind in opinions if fact in step.provides]
        return [signal, *((_twin if float64 else _trial)(program, step, ctx, kind) for kind in seconds)]
    if step.preserves is Preserves.BITWISE:  # one that fits ranges makes them anew, of the quantized network
        kinds = (Equal,) if FITTED in step.provides else (Equal, Headroom)
        return [_trial(program, step, ctx, *kinds, Repeated)]
    kind = SameCodes if {QDQ, INTEGER} & program.facts else Close
    if not float64 or program.dtype == torch.float64:
        return [_trial(program, step, ctx, kind, Headroom)]
    return [_twin(program, step, ctx, kind, Headroom), _trial(program, step, ctx, kind)]


def _trial(
    program: Program, step: Pass, ctx: PassContext, *kinds: Callable[..., Judge], twin: bool = False
) -> _Trial:
    probed = strong(program, ctx.generator())
    probes = draw(probed, ctx.generator()) + at_edges(probed, ctx.generator())
    judges = [kind(probed, probes) for kind in kinds]
    return _Trial(probed, step, ctx, Together([*judges, EveryRow(probed, probes, kinds[0])]), twin)


def _twin(program: Program, step: Pass, ctx: PassContext, *kinds: Callable[..., Judge]) -> _Trial:
    return _trial(program.astype(torch.float64), step, ctx, *kinds, twin=True)


def _rows(program: Program, ctx: PassContext) -> list[dict[str, Tensor]]:
    """A few calibration rows, or probes where there is no calibration."""
    if ctx.calibration is None:
        return draw(program, ctx.generator())
    chosen = ctx.calibration.select(_SIGNAL_ROWS, ctx.generator())
    batches = chosen.batches(_SIGNAL_ROWS, program.inputs, dtype=program.dtype)
    return [{name: value.to(program.device) for name, value in batch.items()} for batch in batches]


def _floor(ctx: PassContext) -> float | None:
    """The least SQNR in dB that the policy expects; on probes, which no range was made for, there is none."""
    return ctx.policy.expect.sqnr_db if ctx.policy is not None and ctx.calibration is not None else None


def _run(step: Pass, program: Program, ctx: PassContext, fuel: int | None) -> tuple[Program, Journal]:
    journal = Journal(fuel=fuel)
    after = step.run(program, replace(ctx, journal=journal, run_dir=None))  # it is computed, not read
    after = replace(after, facts=(program.facts - step.clears) | step.provides)
    check_structure(after, step.name(), program)
    return after, journal


def _error(
    step: Pass, what: str, finding: Finding, rule: str, address: str, fuel: int | None, mend: str
) -> VerifyError:
    return VerifyError(
        what,
        step=step.name(),
        rule=rule,
        address=address,
        error=finding.error,
        limit=finding.limit,
        fuel=fuel,
        mend=mend,
    )


def _refute_claim(step: Pass, broken: Broken, journal: Journal) -> VerifyError:
    return VerifyError(
        f"{broken.kind} of {broken.site}: {broken.reason}",
        step=step.name(),
        rule=_rule_at(str(broken.site.at), journal.applied),
        address=str(broken.site.at),
        mend="see it again: dmqfx.verify(program, step, ctx)",
    )


def _rule_at(address: str, applied: Sequence[Application]) -> str:
    """The rule that was applied at an address; where none was, the only one that was applied at all."""
    every = {a.rule for a in applied}
    return next((a.rule for a in applied if str(a.at) == address), every.pop() if len(every) == 1 else "")
