"""How bugs are planted: built-in passes with one function replaced or their result spoiled, and programs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from types import MappingProxyType
from unittest.mock import patch

from torch import Tensor, fx
from toys import PROMPTED, prompted, rows, toy

from dmqfx.graph import ops
from dmqfx.graph.address import Site
from dmqfx.graph.journal import Journal
from dmqfx.graph.modules import clone
from dmqfx.graph.pattern import Rule
from dmqfx.graph.pipeline import Pass, PassContext, run_step
from dmqfx.graph.program import Program
from dmqfx.graph.registry import create, passes
from dmqfx.graph.rewrite import Refuse, Rewriter
from dmqfx.policy.policy import Policy

Function = Callable[..., object]
Plant = Callable[[str], Pass]
Spoil = Callable[[Program, Program], Program]

NEAREST: Mapping[str, object] = {"method": "nearest"}
"""Options of round-weights that need no calibration rows."""
SHORT: Mapping[str, Mapping[str, object]] = MappingProxyType(
    {
        "round-weights": NEAREST,
        "learn-steps": {"batch": 4, "iterations": 30},
        "reconstruct-blocks": {"batch": 4, "iterations": 30, "rate": 0.1},
    }
)
"""Options of what would take long: what is wrong with the result is wrong after few iterations, too."""
ORDER = (
    "canonicalize flag-skips plan-sites insert-observers freeze-observers pair-layers learn-scaling "
    "apply-scaling absorb-scaling round-weights insert-qdq"
).split()
"""The pipeline of the programs that bugs are planted in; the lowering passes may follow."""
AFTER = {
    "lower-cpu": "lower-reference",
    "fuse": "lower-cpu",
    "lower-float": "fuse",
    "hoist-invariants": "lower-float",
    "learn-steps": "round-weights",
}
"""Passes that follow another one and stand in no pipeline here."""
SWEPT = (
    "canonicalize flag-skips split-skips plan-sites insert-observers freeze-observers pair-layers learn-scaling "
    "apply-scaling absorb-scaling measure-sensitivity fit-ranges vote-shifts round-weights reconstruct-blocks "
    "correct-bias insert-qdq"
).split()
"""The same with the passes that sweep, and skips whose arms are layers of their own."""
SPLIT = (
    "canonicalize flag-skips split-attention plan-sites insert-observers freeze-observers pair-layers learn-scaling "
    "apply-scaling absorb-scaling fit-ranges round-weights insert-qdq"
).split()
"""With attention in two products."""


_PROMPTED = ({"name": "values", "at": "to_v/*", "input": {"groups": 1}},)
_TOY = (
    {"name": "up", "at": ["up.1.*/*"], "weight": {"bits": 8, "grid": "affine"}},
    {"name": "proj", "at": "mid.proj/*", "weight": {"per": "tensor"}, "input": {"grid": "symmetric"}},
)


def _policy(
    name: str,
    *more: Mapping[str, object],
    order: Sequence[str | Mapping[str, object]] = ORDER,
    of: Sequence[Mapping[str, object]] = _TOY,
) -> Policy:
    """Signed and unsigned, 4 and 8 bit weights, scales per tensor and per channel, and float layers."""
    rules = [{"name": "ends", "at": ["conv_in/*", "conv_out/*"], "keep": "float"}, *of, *more]
    default = {
        "weight": {"bits": 4, "grid": "symmetric", "per": "channel", "range": "minmax"},
        "input": {"bits": 8, "grid": "affine", "per": "tensor", "groups": 4},
    }
    steps = [{step: NEAREST} if step == "round-weights" else step for step in order]
    whole = {"schema": "dmqfx.policy/1", "name": name, "default": default, "rules": rules, "pipeline": steps}
    return Policy.load(whole)


POLICIES: Mapping[str, Policy] = MappingProxyType(
    {
        "layers": _policy("layers"),
        "attention": _policy(
            "attention",
            {"name": "attention", "kind": "attention", "input": {"bits": 8}},
            {"name": "channels", "at": "up.0.conv_shortcut/*", "input": {"per": "channel"}},
            {"name": "keys", "at": "mid.to_k/*", "input": {"bits": 6}, "weight": {"range": "mse"}},
        ),
        "softmax": _policy(
            "softmax",
            {"name": "attention", "kind": "attention", "input": {"bits": 8}},
            {"name": "softmax", "kind": "softmax", "input": {"bits": 8, "per": "channel"}, "optional": True},
            order=SPLIT,
        ),
        "attended": _policy("attended", order=[*ORDER, {"quantize-attention": {"keys": 1}}]),
        "shifts": _policy("shifts", order=SWEPT),
        "searched": _policy(
            "searched",
            {
                "name": "searched",
                "at": ["down.*/*", "mid.*/*", "up.*.*/*"],
                "input": {"range": "mse", "bits": 6},
            },
            order=SWEPT,
        ),
    }
)
PLAIN = _policy("plain", of=())
"""For programs of other shapes: every layer but the ends alike."""
PROMPTED_POLICIES: Mapping[str, Policy] = {
    name: _policy(name, of=_PROMPTED) for name in ("one prompt", "many prompts")
}
"""Those of the toy that takes a context."""
PROMPTS = {"one prompt": 1, "many prompts": 12}
"""How many contexts it is calibrated on."""


@cache
def context(policy: str = "layers") -> PassContext:
    """A policy and calibration rows for the toy."""
    data = rows(spec=PROMPTED, prompts=PROMPTS[policy]) if policy in PROMPTS else rows()
    return PassContext(policy={**POLICIES, **PROMPTED_POLICIES}[policy], calibration=data)


def bare(name: str) -> Pass:
    """A pass as it is by default, but for weights, which go to their nearest codes."""
    return create(name, options(name))


def options(name: str) -> Mapping[str, object]:
    """What `bare` asks of a pass."""
    return SHORT.get(name, {})


@cache
def program_before(step: str, policy: str = "layers") -> Program:
    """The toy as a pass of the pipeline, or a lowering behind it, meets it; late: after round-weights."""
    if step == "absorb-scaling late":
        return run_step(bare("round-weights"), program_before("absorb-scaling", policy), context(policy))
    if step in AFTER:
        last = AFTER[step]
        return run_step(bare(last), program_before(last, policy), context(policy))
    steps = {**POLICIES, **PROMPTED_POLICIES}[policy].pipeline
    order = [each.name for each in steps]
    index = order.index(step) if step in order else len(order)
    if index == 0:
        return prompted() if policy in PROMPTS else toy()
    last = steps[index - 1]
    return run_step(create(last.name, last.keywords()), program_before(last.name, policy), context(policy))


@dataclass(frozen=True)
class Mutant:
    """A built-in pass with one thing wrong, and the address that the verifier should name.

    `at` is empty where nothing in the journal is at fault; `meets` names the pass whose program it gets.
    """

    name: str
    pass_name: str
    plant: Plant
    at: str
    policy: str
    meets: str

    def make(self) -> Pass:
        """The pass with the bug."""
        return self.plant(self.pass_name)

    def honest(self) -> Pass:
        """The pass without it."""
        return bare(self.pass_name)

    def program(self) -> Program:
        """What both are run on."""
        return program_before(self.meets, self.policy)


def planted(
    step: str, bugs: Mapping[str, tuple[Plant, str]], policy: str = "layers", meets: str = ""
) -> Iterator[Mutant]:
    """Bugs of one pass, by what is wrong: how each is planted and where it should be found."""
    return (Mutant(name, step, plant, at, policy, meets or step) for name, (plant, at) in bugs.items())


def derived(**changed: object) -> Plant:
    """The pass with other class attributes."""

    def plant(step: str) -> Pass:
        honest = passes()[step]
        made: type[Pass] = type(honest.__name__, (honest,), changed)
        return made(**options(step))

    return plant


def patched(function: str, wrong: Callable[[Function], object], where: object = None) -> Plant:
    """The pass while something of its module (or of `where`) is what `wrong` makes of the honest one."""

    def plant(step: str) -> Pass:
        honest = passes()[step]
        owner = where or sys.modules[honest.__module__]

        def run(self: Pass, program: Program, ctx: PassContext) -> Program:
            with patch.object(owner, function, wrong(getattr(owner, function))):
                return honest.run(self, program, ctx)

        return derived(run=run)(step)

    return plant


def spoiled(spoil: Spoil) -> Plant:
    """The pass, and then something done to its result: `spoil(before, after)`."""

    def plant(step: str) -> Pass:
        honest = passes()[step]

        def run(self: Pass, program: Program, ctx: PassContext) -> Program:
            return spoil(program, honest.run(self, program, ctx))

        return derived(run=run)(step)

    return plant


def with_rule(wrong: Rule) -> Plant:
    """The pass with one more rule."""
    return lambda step: derived(rules=(wrong, *vars(passes()[step])["rules"]))(step)


def with_entry(site: str, kind: type, change: Function) -> Plant:
    """The pass, and then one entry of the table changed."""
    at = Site.parse(site)

    def spoil(before: Program, after: Program) -> Program:
        entry = after.table.get(at, kind)
        return after if entry is None else after.with_table(after.table.put(at, change(entry)))

    return spoiled(spoil)


def without_entry(site: str, kind: type) -> Plant:
    """The pass, and then one entry of the table left out."""

    def spoil(before: Program, after: Program) -> Program:
        return after.with_table(after.table.drop(Site.parse(site), kind))

    return spoiled(spoil)


def with_constant(name: str, change: Callable[[Tensor], Tensor]) -> Plant:
    """The pass, and then one constant of its graph changed."""

    def spoil(before: Program, after: Program) -> Program:
        constants = after.weights()
        constants[name] = change(constants[name].clone())
        return replace(after, gm=clone(after.gm, constants))

    return spoiled(spoil)


def edited(operator: str, edit: Callable[[Rewriter, fx.Node], fx.Node | None]) -> Plant:
    """The pass, and then calls of one operator replaced by what `edit` answers."""

    def spoil(before: Program, after: Program) -> Program:
        rw = Rewriter(after, "edit", Journal())
        for node in [n for n in rw.graph.nodes if ops.is_call(n, operator)]:
            with rw.before(node):
                new = edit(rw, node)
            if new is not None:
                rw.replace(node, new)
        return rw.finish()

    return spoiled(spoil)


def operands(**changed: Callable[[Rewriter, Mapping[str, fx.node.Argument]], fx.node.Argument]) -> Plant:
    """A lowering with arguments of its integer layers changed."""

    def wrong(honest: Function) -> Function:
        def read(rw: Rewriter, *given: object, **named: object) -> object:
            found = honest(rw, *given, **named)
            return (
                found if isinstance(found, Refuse) else found | {k: f(rw, found) for k, f in changed.items()}
            )

        return read

    return patched("_operands", wrong)


def nothing(rw: Rewriter, found: Mapping[str, fx.node.Argument]) -> None:
    return None
