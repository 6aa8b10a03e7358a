"""Patterns over fx nodes with schema-named arguments, rules made of them, and passes made of rules.

What a pattern does not mention it does not constrain. Interior nodes must have no other reader, or the match
is refused.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, TypeAlias

from torch import fx

from dmqfx.errors import RewriteError
from dmqfx.graph import ops
from dmqfx.graph.modules import label
from dmqfx.graph.pipeline import Pass, PassContext
from dmqfx.graph.program import Program
from dmqfx.graph.rewrite import Refuse, Rewriter
from dmqfx.words import suggest

Captures: TypeAlias = dict[str, fx.node.Argument]
Outcome: TypeAlias = "fx.Node | Refuse | None"


@dataclass(frozen=True)
class Pattern(ABC):
    """Something a node or an argument can match; `name` captures it for the rule's function."""

    name: str = ""

    def as_(self, name: str) -> Pattern:
        """The same pattern, captured under a name."""
        return replace(self, name=name)

    @abstractmethod
    def accepts(self, value: fx.node.Argument, found: Captures) -> bool:
        """Whether the value matches; captures go to `found`."""

    def match(self, value: fx.node.Argument, found: Captures) -> bool:
        """`accepts`, with the capture; a name used twice must capture the same value."""
        if not self.accepts(value, found):
            return False
        if self.name:
            if self.name in found and found[self.name] is not value:
                return False
            found[self.name] = value
        return True

    def interior(self, value: fx.node.Argument) -> Iterator[fx.Node]:
        """The matched operations below the root."""
        return iter(())

    def roots(self) -> tuple[str, ...]:
        """The operators that a match is a call of; none where it may be anything."""
        return ()

    def names(self) -> frozenset[str]:
        """What a match captures."""
        return frozenset({self.name} - {""})


@dataclass(frozen=True)
class Anything(Pattern):
    """Any argument: a node, a number, None."""

    def accepts(self, value: fx.node.Argument, found: Captures) -> bool:
        return True


@dataclass(frozen=True)
class Constant(Pattern):
    """A weight or buffer (a get_attr node)."""

    def accepts(self, value: fx.node.Argument, found: Captures) -> bool:
        return isinstance(value, fx.Node) and value.op == "get_attr"


@dataclass(frozen=True)
class Literal(Pattern):
    """A number, string, list or None equal to this one."""

    value: object = None

    def accepts(self, value: fx.node.Argument, found: Captures) -> bool:
        same_kind = isinstance(value, bool) == isinstance(self.value, bool)  # True == 1 in Python
        return not isinstance(value, fx.Node) and same_kind and value == self.value


@dataclass(frozen=True)
class Call(Pattern):
    """A call of one of these operators whose mentioned arguments match."""

    operators: tuple[str, ...] = ()
    args: tuple[tuple[str, Pattern], ...] = ()

    def __post_init__(self) -> None:
        known = {arg for name in self.operators for arg in ops.arguments_of(name)}
        for arg, _ in self.args if known else ():
            if arg not in known:
                what = " or ".join(self.operators)
                raise TypeError(f"{what} has no argument {arg!r}; {suggest(arg, known)}")

    def accepts(self, value: fx.node.Argument, found: Captures) -> bool:
        if not isinstance(value, fx.Node) or not ops.is_call(value, *self.operators):
            return False
        named = ops.args(value)
        return all(arg in named and pattern.match(named[arg], found) for arg, pattern in self.args)

    def interior(self, value: fx.node.Argument) -> Iterator[fx.Node]:
        if isinstance(value, fx.Node):
            named = ops.args(value)
            for arg, pattern in self.args:
                inner = named[arg]
                if isinstance(pattern, Call) and isinstance(inner, fx.Node):
                    yield inner
                    yield from pattern.interior(inner)

    def roots(self) -> tuple[str, ...]:
        return self.operators

    def names(self) -> frozenset[str]:
        return super().names().union(*(pattern.names() for _, pattern in self.args))


class _Patterns:
    """`p.conv2d(input=p.any("x"), weight=p.attr("w"))`: operators by name, arguments by schema name.

    Raises: TypeError for an argument that no overload of the operator has.
    Example:
        >>> p.silu(self=p.any("x")).names()
        frozenset({'x'})
    """

    def any(self, name: str = "") -> Pattern:
        """Any argument."""
        return Anything(name)

    def attr(self, name: str = "") -> Pattern:
        """A weight or buffer."""
        return Constant(name)

    def value(self, value: object) -> Pattern:
        """A literal equal to this."""
        return Literal("", value)

    def one_of(self, *names: str, **args: Pattern) -> Pattern:
        """A call of any of the named operators."""
        return Call("", names, tuple(args.items()))

    def __getattr__(self, name: str) -> Callable[..., Pattern]:
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda **args: Call("", (name,), tuple(args.items()))


p = _Patterns()


@dataclass(frozen=True)
class Rule:
    """A pattern and the function that answers a match with a node, a Refuse, or None for "not my case"."""

    pattern: Pattern
    function: Callable[..., Outcome]
    wants: tuple[str, ...]

    @property
    def name(self) -> str:
        """The function's name: what the journal, `why` and the verifier call the rule."""
        return self.function.__name__

    def try_at(self, rw: Rewriter, root: fx.Node) -> Outcome:
        """The function's answer at a node, or None where the pattern does not match."""
        found: Captures = {"root": root}
        if not self.pattern.match(root, found):
            return None
        matched = [root, *self.pattern.interior(root)]
        for inner in matched[1:]:
            others = sorted(label(reader) for reader in inner.users if reader not in matched)
            if others:
                return Refuse(f"{label(inner)} is also read by {', '.join(others[:3])}", inner)
        with rw.before(root):
            return self.function(rw, **{name: found[name] for name in self.wants})


def rule(pattern: Pattern) -> Callable[[Callable[..., Outcome]], Rule]:
    """Make a rule of the function below: parameters after the rewriter are named captures (and `root`).

    Raises: TypeError for a parameter that the pattern does not capture.
    Example:
        >>> @rule(p.mul(self=p.any("x"), other=p.value(1.0)))
        ... def drop_one(rw, x):
        ...     return x
        >>> drop_one.name, drop_one.wants
        ('drop_one', ('x',))
    """

    def wrap(function: Callable[..., Outcome]) -> Rule:
        wants, known = tuple(inspect.signature(function).parameters)[1:], pattern.names() | {"root"}
        for name in wants:
            if name not in known:
                raise TypeError(
                    f"{function.__name__}: its pattern captures no {name!r}; {suggest(name, known)}"
                )
        return Rule(pattern, function, wants)

    return wrap


@dataclass(frozen=True)
class RewritePass(Pass):
    """A pass that is a list of rules, applied in graph order until none fires.

    Example:
        >>> from dmqfx.graph.pipeline import Preserves
        >>> class DropNothing(RewritePass):
        ...     preserves = Preserves.BITWISE
        >>> DropNothing().rules, DropNothing.name()
        ((), 'drop-nothing')
    """

    rules: ClassVar[tuple[Rule, ...]] = ()

    def run(self, program: Program, ctx: PassContext) -> Program:
        """Sweep the rules over the graph until nothing changes."""
        rw = Rewriter(program, self.name(), ctx.journal)
        limit = 10 * len(rw.graph.nodes) + 100
        while sweep(rw, self.rules):
            if len(ctx.journal.applied) > limit:
                raise RewriteError(
                    f"{self.name()} does not come to an end: {limit} rewrites and still counting"
                )
        return rw.finish()


def sweep(rw: Rewriter, rules: tuple[Rule, ...]) -> int:
    """Try each rule once at each operation in order; how many fired."""
    fired, likely = 0, dict[str, list[Rule]]()
    for node in list(rw.graph.nodes):
        if node.op != "call_function" or getattr(node, "_erased", False):
            continue
        name = ops.name(node)
        if name not in likely:
            likely[name] = [rule for rule in rules if name in (rule.pattern.roots() or (name,))]
        fired += any(_fire(rw, rule, node) for rule in likely[name])
    return fired


def _fire(rw: Rewriter, rule: Rule, node: fx.Node) -> bool:
    if rw.journal.exhausted:
        return False
    at = node.meta["address"]
    outcome = rule.try_at(rw, node)
    if isinstance(outcome, Refuse):
        rw.journal.refuse(at, rule.name, outcome.reason)
    if not isinstance(outcome, fx.Node):
        return False
    rw.journal.apply(at, rule.name)
    rw.replace(node, outcome)
    return True
