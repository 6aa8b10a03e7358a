"""A policy as a value: which bits each tensor of each operation gets, and which steps run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, Literal

from dmqfx.errors import PolicyError
from dmqfx.globs import matcher
from dmqfx.graph.address import Address, Site
from dmqfx.graph.table import Planned
from dmqfx.numbers.quant import QuantSpec
from dmqfx.policy.idle import problem_with_idle
from dmqfx.policy.mark import Mark, Said
from dmqfx.policy.setting import BUILT_IN, FLOAT, Default, PartialSpec, Setting

__all__ = [
    "BUILT_IN",
    "FLOAT",
    "KIND_OF_OPERATOR",
    "OPERANDS",
    "CheckStep",
    "Default",
    "Expect",
    "Explanation",
    "FedBy",
    "Kind",
    "Operation",
    "Option",
    "PartialSpec",
    "Policy",
    "Rule",
    "Setting",
    "Step",
    "explain",
    "resolve",
]

Kind = Literal["conv2d", "linear", "attention", "softmax"]
FedBy = Literal["skip_concat"]
Scalar = bool | int | float | str | None
Option = Scalar | tuple[Scalar, ...]
CheckStep = Callable[[str, Mapping[str, object]], Mapping[str, str]]
"""Says what is wrong with a step's name (as "") and with each of its options."""

KIND_OF_OPERATOR: Final[Mapping[str, Kind]] = MappingProxyType(
    {
        "conv2d": "conv2d",
        "linear": "linear",
        "scaled_dot_product_attention": "attention",
        "attention_softmax": "attention",
        "attention_average": "attention",
    }
)
"""The operators that have sites, by the last part of their address."""
OPERANDS: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "conv2d": ("input", "weight"),
        "linear": ("input", "weight"),
        "scaled_dot_product_attention": ("query", "key", "value"),
        "attention_softmax": ("query", "key"),
        "attention_average": ("softmax", "value"),
    }
)
"""The arguments that are sites, by operator."""
_PRODUCTS: Final = ("attention", "softmax")


@dataclass(frozen=True)
class Operation:
    """One operation that has sites.

    `fed_by_skip` says that its input is a decoder's concatenation with a long skip, as flag-skips found it, or
    one arm of it, as split-skips left it.
    """

    address: Address
    kind: Kind
    fed_by_skip: bool = False

    @property
    def operands(self) -> dict[str, Kind]:
        """The arguments that are sites, and the kind of rule that is about each: a softmax has one of its own."""
        return {arg: "softmax" if arg == "softmax" else self.kind for arg in OPERANDS[self.address.op]}


@dataclass(frozen=True)
class Rule:
    """An exception from the default: which operations (`at`, `kind` and `fed_by` must all hold) get what.

    `at` holds globs and `re:` expressions of which one must match, () is any address; they match what a pass
    made of an operation (`conv/conv2d~split-skips.1`) where they match the operation. A setting of None leaves
    that argument to others; `keep: float` in a file is both settings at once.
    """

    name: str
    at: tuple[str, ...] = ()
    kind: Kind | None = None
    fed_by: FedBy | None = None
    weight: Setting | None = None
    input: Setting | None = None
    optional: bool = False
    mark: Mark = field(default=Mark(), compare=False, repr=False)

    def selector(self) -> Callable[[Operation], bool]:
        """The test of whether `at`, `kind` and `fed_by` all hold.

        Raises: PolicyError for a pattern that is neither a glob nor a regular expression.
        """
        try:
            patterns = [matcher(pattern) for pattern in self.at]
        except ValueError as error:
            raise PolicyError([self.mark.problem(f"rule {self.name!r}: {error}")]) from error

        def holds(operation: Operation) -> bool:
            if self.kind is not None and self.kind not in operation.operands.values():
                return False
            if self.fed_by and not operation.fed_by_skip:
                return False
            return not patterns or any(fits(name) for fits in patterns for name in operation.address.names)

        return holds

    def asks(self, kind: Kind, arg: str) -> Setting | None:
        """What this rule says about an argument, of this kind, of an operation it matches; None is nothing.

        Attention operands stay float unless a rule says their kind: "all inputs" does not mean them.
        """
        if arg == "weight":
            return self.weight
        if self.kind not in (None, kind) or (kind in _PRODUCTS and self.kind is None and self.input != FLOAT):
            return None
        return self.input


@dataclass(frozen=True)
class Step:
    """One entry of the pipeline: a pass by name, with its options in alphabetical order."""

    name: str
    options: tuple[tuple[str, Option], ...] = ()
    mark: Mark = field(default=Mark(), compare=False, repr=False)

    def keywords(self) -> dict[str, Option]:
        """The options as keyword arguments of the pass."""
        return dict(self.options)


@dataclass(frozen=True)
class Expect:
    """What the result must reach.

    Units: sqnr_db is the least signal-to-quantization-noise ratio of the output, in dB.
    """

    sqnr_db: float | None = None


@dataclass(frozen=True)
class Policy:
    """Bits and steps of one compilation, complete in itself: what it extends has been merged in.

    Example:
        >>> policy = Policy.load("w4a8", ["default.weight.bits=3"])
        >>> policy.default.weight.bits, policy.default.input.bits
        (3, 8)
    """

    name: str
    default: Default
    pipeline: tuple[Step, ...]
    rules: tuple[Rule, ...] = ()
    expect: Expect = Expect()
    description: str = ""

    @property
    def searched_at(self) -> Said | None:
        """Where it asks first for an input's range other than the extremes."""
        return next(
            (
                Said(f"{at}.range: {spec.range}", spec.mark)
                for at, spec in self._specs("input")
                if spec.range not in (None, "minmax")
            ),
            None,
        )

    @property
    def bits_asked_at(self) -> Said | None:
        """Where it asks for bits first, such as `default.weight`; None if everything stays float on purpose."""
        return next((Said(at, spec.mark) for at, spec in self._specs("weight", "input")), None)

    def _specs(self, *arguments: str) -> Iterator[tuple[str, PartialSpec]]:
        """What is not float, and where it is said."""
        said: dict[str, Default | Rule] = {
            "default": self.default,
            **{f"rules.{rule.name}": rule for rule in self.rules},
        }
        for at, each in said.items():
            for arg in arguments:
                if isinstance(setting := getattr(each, arg), PartialSpec):
                    yield f"{at}.{arg}", setting

    @staticmethod
    def load(
        source: str | os.PathLike[str] | Mapping[str, object] | Policy,
        overrides: Sequence[str] = (),
        *,
        check_step: CheckStep | None = None,
    ) -> Policy:
        """A policy from a shipped name (with or without .yaml), a path, a dict or a policy, then `a.b=c`s.

        Raises: PolicyError with every mistake at once.
        """
        from dmqfx.policy.file import load_policy

        return load_policy(source, overrides, check_step)

    def __str__(self) -> str:
        from dmqfx.policy.file import print_policy

        return print_policy(self)


@dataclass(frozen=True)
class Explanation:
    """What one site gets, the rule that decided, and the rules before it that asked in vain."""

    site: Site
    spec: QuantSpec | None
    rule: str
    overridden: tuple[str, ...] = ()


def resolve(
    policy: Policy, operations: Sequence[Operation], train_timesteps: int = 1000
) -> dict[Site, Planned]:
    """What the policy asks of every site, in the order of the operations.

    Raises: PolicyError with every rule that matches nothing and is not optional.
    """
    found = explain(policy, operations, train_timesteps)
    return {each.site: Planned(each.spec, each.rule) for each in found}


def explain(
    policy: Policy, operations: Sequence[Operation], train_timesteps: int = 1000
) -> list[Explanation]:
    """As `resolve`, with the rules that were overridden.

    Raises: PolicyError with every rule that matches nothing and is not optional.
    """
    matched = [[op for op in operations if holds(op)] for holds in (rule.selector() for rule in policy.rules)]
    problems = [
        problem_with_idle(rule, operations, hits)
        for rule, hits in zip(policy.rules, matched, strict=True)
        if not rule.optional
        and not any(rule.asks(kind, arg) for op in hits for arg, kind in op.operands.items())
    ]
    if problems:
        raise PolicyError(problems)
    at: dict[Address, list[Rule]] = {op.address: [] for op in operations}
    for rule, hits in zip(policy.rules, matched, strict=True):
        for op in hits:
            at[op.address].append(rule)
    return [
        _explain_site(policy, at[op.address], op, arg, train_timesteps)
        for op in operations
        for arg in op.operands
    ]


def _explain_site(
    policy: Policy, rules: Sequence[Rule], operation: Operation, arg: str, train_timesteps: int
) -> Explanation:
    site, key = Site(operation.address, arg), "weight" if arg == "weight" else "input"
    kind = operation.operands[arg]
    asking = [rule for rule in rules if rule.asks(kind, arg)]
    if not asking:
        mine = policy.default.weight if key == "weight" else policy.default.input
        setting = FLOAT if kind in _PRODUCTS else policy.default.complete(key, mine)
        return Explanation(site, _spec(setting, key, "default", Mark(), train_timesteps), "default")
    last = asking[-1]
    setting = policy.default.complete(key, last.asks(kind, arg) or FLOAT)
    spec = _spec(setting, key, last.name, last.mark, train_timesteps)
    return Explanation(site, spec, last.name, tuple(rule.name for rule in asking[:-1]))


def _spec(setting: Setting, key: str, rule: str, mark: Mark, train_timesteps: int) -> QuantSpec | None:
    if setting == FLOAT:
        return None
    if setting.bits is None or setting.grid is None or setting.per is None or setting.range is None:
        raise PolicyError([mark.problem(f"{rule}: {key} has no bits, and the default has none to take over")])
    if key == "weight" and setting.range not in ("minmax", "mse"):
        words = f"a weight's range can be minmax or mse; {setting.range} is for inputs"
        raise PolicyError([mark.problem(f"{rule}: {words}")])
    if key == "input" and setting.per == "channel" and setting.range != "minmax":
        words = f"an input that is per channel takes its range from minmax, not {setting.range}"
        raise PolicyError([mark.problem(f"{rule}: {words}")])
    boundaries = () if key == "weight" else setting.boundaries(train_timesteps)
    return QuantSpec(setting.bits, setting.grid, setting.per, setting.range, boundaries)
