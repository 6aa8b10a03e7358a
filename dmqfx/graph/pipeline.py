"""Passes and the pipeline that runs them: checks the order, checks each result, keeps the log."""

from __future__ import annotations

import enum
import logging
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch

from dmqfx import processes
from dmqfx.errors import PipelineError, RewriteError
from dmqfx.graph.facts import CALIBRATED, Fact
from dmqfx.graph.fingerprint import fingerprint, refuse_changes, tensors
from dmqfx.graph.invariants import check_facts, check_structure
from dmqfx.graph.journal import Journal, PassRecord
from dmqfx.graph.program import Program
from dmqfx.machine import give_back_memory, memory_given_back

if TYPE_CHECKING:
    from dmqfx.calibration.calibration import Calibration
    from dmqfx.policy.policy import Policy
    from dmqfx.sweep.budget import Budget

logger = logging.getLogger(__name__)


class Preserves(enum.Enum):
    """What a pass promises about the program's output. There is no default: the author must say.

    Example:
        >>> Preserves("exact") is Preserves.EXACT
        True
    """

    BITWISE = "bitwise"
    EXACT = "exact"
    LOSSY = "lossy"


@dataclass(frozen=True)
class PassContext:
    """What a pass may read besides the program.

    Units: seed starts every generator; a sweep takes at most `chunk` calibration rows at a time, `memory`
    bytes beside the model and about its share of the `budget` (None: what it takes), and keeps its finished turns in
    `run_dir`; the journal's fuel is the number of applications still allowed (None: no limit).
    Example:
        >>> PassContext(seed=3).generator().initial_seed()
        3
    """

    policy: Policy | None = None
    calibration: Calibration | None = None
    seed: int = 0
    progress: bool = False
    train_timesteps: int = 1000
    memory: int = 6 * 2**30
    chunk: int = 16
    budget: Budget | None = None
    run_dir: Path | None = None
    journal: Journal = field(default_factory=Journal)

    def generator(self) -> torch.Generator:
        """A fresh generator from the seed."""
        return torch.Generator().manual_seed(self.seed)


@dataclass(frozen=True)
class Pass(ABC):
    """A frozen value that maps a program to a program; its fields are its options.

    `preserves` must be declared by every concrete pass: the pipeline refuses one without it. `forbids` are facts
    that must not hold yet, as `qdq` for what decides about the float program. `only_with` names, for an option, another
    one and its values without which it has no effect.

    Example:
        >>> class LookAround(Pass):
        ...     preserves = Preserves.BITWISE
        ...
        ...     def run(self, program, ctx):
        ...         return program
        >>> LookAround.name()
        'look-around'
    """

    requires: ClassVar[frozenset[Fact]] = frozenset()
    provides: ClassVar[frozenset[Fact]] = frozenset()
    clears: ClassVar[frozenset[Fact]] = frozenset()
    forbids: ClassVar[frozenset[Fact]] = frozenset()
    preserves: ClassVar[Preserves]
    only_with: ClassVar[Mapping[str, tuple[str, tuple[str, ...]]]] = {}

    @property
    def needs(self) -> frozenset[Fact]:
        """The facts that must hold: `requires`, and what its options ask for beyond."""
        return self.requires

    @property
    def needs_calibration(self) -> bool:
        """Whether it reads calibration rows and fails without."""
        return CALIBRATED in self.provides

    @property
    def budgeted(self) -> frozenset[str]:
        """The fields that a time budget multiplies, of `rows` and `iterations`."""
        return frozenset()

    @abstractmethod
    def run(self, program: Program, ctx: PassContext) -> Program:
        """The rewritten program; the given one is not touched."""

    @classmethod
    def name(cls) -> str:
        """The pass's name in policies: the class name in kebab case."""
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", cls.__name__).lower()


@dataclass(frozen=True)
class JointPass(Pass):
    """A pass that can share one walk over the data with its neighbours in a pipeline.

    Neighbours are consecutive passes with the same `run_jointly`; each has its own context and journal.
    """

    @classmethod
    @abstractmethod
    def run_jointly(cls, steps: Sequence[tuple[JointPass, PassContext]], program: Program) -> Program:
        """The program after all of them."""

    def run(self, program: Program, ctx: PassContext) -> Program:
        """The program after this one alone."""
        return self.run_jointly([(self, ctx)], program)


def check_declared(step: object, place: str = "") -> None:
    """Refuse what is no pass, and a pass whose author has not said what it preserves; `place` is where it stands.

    Raises: PipelineError.
    """
    if not isinstance(step, Pass):
        raise PipelineError(f"{place or 'the step'} is {_called(step)}")
    if not isinstance(getattr(step, "preserves", None), Preserves):
        who = f"{place}, {step.name()}," if place else step.name()
        raise PipelineError(f"{who} does not declare what it preserves (BITWISE, EXACT or LOSSY)")


def _called(given: object) -> str:
    """What is no pass, and what to pass instead."""
    if isinstance(given, str):
        what, name = f"the name {given!r}", repr(given)
    elif isinstance(given, type):
        what = f"the class {given.__name__}"
        name = repr(given.name()) if issubclass(given, Pass) else "name"
    else:
        what, name = "None" if given is None else f"a {type(given).__name__}", "name"
    return f"{what}, not a pass; pass an instance: create({name}), from dmqfx.graph.registry"


Observe = Callable[[Pass, Program, Program, PassContext], float | None]


@dataclass(frozen=True)
class Pipeline:
    """An order of passes. Never re-sorted, nothing inserted: a wrong order is refused with a hint.

    Example:
        >>> Pipeline(()).run.__name__
        'run'
    """

    steps: tuple[Pass, ...]

    def check(self, program: Program | None, providers: Sequence[type[Pass]] = ()) -> None:
        """Refuse an order in which a pass lacks what it requires, before anything runs.

        Without a program it is checked for one that was just captured, of which nothing is known.

        Raises: PipelineError naming the step, the fact and the pass that would help.
        """
        for _, problem in self.problems(program, providers):
            raise PipelineError(problem)

    def problems(
        self, program: Program | None, providers: Sequence[type[Pass]] = ()
    ) -> Iterator[tuple[int, str]]:
        """Everything that is wrong with the order, by the index of the step.

        Raises: PipelineError for a pass that does not declare what it preserves.
        """
        known = set(program.facts) if program is not None else set()
        for k, step in enumerate(self.steps, 1):
            check_declared(step, f"step {k}")
            who = f"step {k}, {step.name()},"
            for fact in sorted(step.needs - known, key=str):
                hint = _hint(fact, self.steps, k, providers)
                yield k - 1, f"{who} requires {fact.name!r} ({fact.meaning}); {hint}"
            for fact in sorted(step.forbids & known, key=str):
                before = next((each.name() for each in self.steps[: k - 1] if fact in each.provides), None)
                mend = f"move it before {before}" if before else "run it on the program as it was before"
                mend = f"put {fact.ended_by} before it" if fact.ended_by else mend
                yield k - 1, f"{who} comes too late: {fact.name!r} ({fact.meaning}) holds already; {mend}"
            known = (known - step.clears) | step.provides

    def run(
        self,
        program: Program,
        ctx: PassContext,
        *,
        providers: Sequence[type[Pass]] = (),
        observe: Observe | None = None,
    ) -> Program:
        """Run every pass on a fork, check its result and append to the log.

        `observe(step, before, after, ctx)` may verify a step; what it returns is recorded as the drift.
        Raises: PipelineError for a wrong order; RewriteError when a pass breaks a structural rule.
        """
        self.check(program, providers)
        with nullcontext() if ctx.calibration is None else memory_given_back():
            for together in _neighbours(self.steps):
                program = run_steps(together, program, ctx, observe)
        return program


def run_steps(
    steps: Sequence[Pass], program: Program, ctx: PassContext, observe: Observe | None = None
) -> Program:
    """One pass, or several that share a walk, on one program: run, structural checks, facts, log.

    Where a step is observed, every bit of the program that it was given must be as before.

    Raises: RewriteError when a pass breaks a structural rule; VerifyError.
    """
    given = fingerprint(program) if observe is not None else None
    started, versions = time.perf_counter(), _versions(program)
    locals_ = [replace(ctx, journal=Journal(fuel=ctx.journal.fuel)) for _ in steps]
    after = _run_alone_or_jointly(list(zip(steps, locals_, strict=True)), program)
    if ctx.calibration is not None:
        give_back_memory()
    names = ", ".join(step.name() for step in steps)
    if given is not None:
        refuse_changes(program, given, names)
    for name, version in _versions(program).items():
        if version != versions.get(name):
            raise RewriteError(f"{names} wrote into {name}, which it shares with the program before it")
    facts = program.facts
    for step in steps:
        facts = (facts - step.clears) | step.provides
    after = replace(after, facts=facts)
    check_structure(after, names, program)
    if ctx.journal.fuel is None:
        check_facts(after, names)
    seconds = (time.perf_counter() - started) / len(steps)
    records = []
    for step, local in zip(steps, locals_, strict=True):
        drift = observe(step, program, after, local) if observe is not None else None
        journal = local.journal
        record = PassRecord(
            step.name(), step.preserves.value, tuple(journal.applied), tuple(journal.refused), seconds, drift,
            journal.note,
        )  # fmt: skip
        logger.info("%s", record)
        records.append(record)
    return replace(after, log=(*program.log, *records))


def _run_alone_or_jointly(steps: Sequence[tuple[Pass, PassContext]], program: Program) -> Program:
    first, ctx = steps[0]
    if ctx.budget is not None:
        ctx.budget.allot([step for step, _ in steps])
    with processes.together():
        if isinstance(first, JointPass) and len(steps) > 1:
            return first.run_jointly([(s, c) for s, c in steps if isinstance(s, JointPass)], program)
        return first.run(program, ctx)


def run_step(step: Pass, program: Program, ctx: PassContext, observe: Observe | None = None) -> Program:
    """What run_steps does, with one pass."""
    return run_steps((step,), program, ctx, observe)


def _neighbours(steps: Sequence[Pass]) -> Iterator[tuple[Pass, ...]]:
    """Consecutive passes that run jointly, and every other pass alone."""
    run: list[Pass] = []
    for step in steps:
        if run and (_walk_of(step) is None or _walk_of(run[-1]) is not _walk_of(step)):
            yield tuple(run)
            run = []
        run.append(step)
    if run:
        yield tuple(run)


def _walk_of(step: Pass) -> object:
    """What passes have in common that share a walk: the function, not the method bound to each class."""
    return getattr(type(step).run_jointly, "__func__", None) if isinstance(step, JointPass) else None


def _versions(program: Program) -> dict[str, int]:
    """How often each tensor of a program has been written into, as far as torch counts it."""
    return {name: each._version for name, each in tensors(program) if not each.is_inference()}


def _hint(fact: Fact, steps: Sequence[Pass], k: int, providers: Sequence[type[Pass]]) -> str:
    later = next((s.name() for s in steps[k:] if fact in s.provides), None)
    if later:
        return f"move {later} before it"
    helpful = [cls.name() for cls in providers if fact in cls.provides - cls.requires]
    if not helpful:
        return "no known pass provides it"
    ended = next((s.name() for s in reversed(steps[: k - 1]) if fact in s.clears), None)
    behind = f"behind {ended}, which ends it, and " if ended else ""
    return f"put {' or '.join(helpful)} {behind}before it"
