"""Hypothesis strategies for policies and for the operations that they decide about."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

from hypothesis import strategies as st

from dmqfx.graph.address import Address
from dmqfx.policy.policy import (
    FLOAT,
    KIND_OF_OPERATOR,
    Default,
    Expect,
    Kind,
    Operation,
    PartialSpec,
    Policy,
    Rule,
    Setting,
    Step,
)

PARTS = ("conv_in", "mid_block", "up_blocks", "down_blocks", "0", "1", "attn1", "to_q", "norm1")

numbers = st.floats(allow_nan=False, allow_infinity=False, min_value=-1e17, max_value=1e17)
words = st.text(st.characters(codec="utf-8"), max_size=20) | st.sampled_from(
    ["on", "1e3", "010", "1:30", "null", "~", "true", ".5", "=", "<<", "2020-01-01", "a: b", "# c", " x "]
)
names = st.from_regex(r"\w[\w -]{0,8}", fullmatch=True)


def kinds() -> st.SearchStrategy[Kind]:
    """Any kind of operation."""
    return st.sampled_from(sorted(get_args(Kind)))


@st.composite
def operations(draw: st.DrawFn) -> list[Operation]:
    """A few operations with different addresses."""
    paths = draw(st.lists(st.lists(st.sampled_from(PARTS), min_size=1, max_size=4), min_size=1, max_size=8))
    found: dict[Address, Operation] = {}
    for path in paths:
        operator = draw(st.sampled_from(sorted(KIND_OF_OPERATOR)))
        kind = KIND_OF_OPERATOR[operator]
        address = Address(".".join(path), operator, draw(st.integers(0, 1)))
        found[address] = Operation(address, kind, kind == "conv2d" and draw(st.booleans()))
    return list(found.values())


@st.composite
def globs(draw: st.DrawFn) -> str:
    """A glob made of the words and joints of addresses, stars anywhere."""
    pieces = st.sampled_from([*PARTS, *KIND_OF_OPERATOR, ".", ".", "/", "/", "*", "*", "**", "**", "?", "#1"])
    return "".join(draw(st.lists(pieces, min_size=1, max_size=6)))


def partial_specs(arg: str, **fixed: Any) -> st.SearchStrategy[PartialSpec]:
    """What a rule may say about an argument; `fixed` replaces a field's strategy."""
    timesteps = numbers.map(abs)  # no call lies below 0
    boundaries = st.lists(timesteps, min_size=1, max_size=4, unique=True).map(
        lambda each: tuple(sorted(each))
    )
    fields: dict[str, Any] = {
        "bits": st.none() | st.integers(2 if arg == "weight" else 4, 8),
        "grid": st.sampled_from([None, "symmetric", "affine"]),
        "per": st.sampled_from([None, "tensor", "channel"]),
        "range": st.sampled_from([None, "minmax", "mse"] if arg == "weight" else [None, "minmax"]),
        "groups": st.none() if arg == "weight" else st.none() | st.integers(1, 1000) | boundaries,
    }
    return st.builds(PartialSpec, **{**fields, **fixed})


def settings_of(arg: str) -> st.SearchStrategy[Setting]:
    """What a default may say about an argument: `float`, or a specification with bits."""
    return st.just(FLOAT) | partial_specs(arg, bits=st.integers(2 if arg == "weight" else 4, 8))


@st.composite
def rules(draw: st.DrawFn, name: str, default: Default, patterns: st.SearchStrategy[str]) -> Rule:
    """A rule that makes sense: it selects something, asks for something, and its bits can be known."""
    at = tuple(draw(st.lists(patterns, max_size=2)))
    kind = draw(st.none() | kinds()) if at else draw(kinds())
    asked = {}
    for arg, base in (("weight", default.weight), ("input", default.input)):
        known = base != FLOAT
        asked[arg] = draw(partial_specs(arg) if known else settings_of(arg)) if draw(st.booleans()) else None
    if kind in ("attention", "softmax"):
        asked["weight"] = None
    if asked == {"weight": None, "input": None}:
        asked = {"weight": FLOAT, "input": FLOAT}
    fed_by = draw(st.sampled_from([None, "skip_concat"]))
    return Rule(name, at, kind, fed_by, asked["weight"], asked["input"], draw(st.booleans()))


@st.composite
def policies(draw: st.DrawFn, patterns: st.SearchStrategy[str] | None = None) -> Policy:
    """A policy that a file can hold."""
    default = Default(draw(settings_of("weight")), draw(settings_of("input")))
    listed = draw(st.lists(names, max_size=4, unique=True))
    patterns = globs() | st.just(r"re:.*conv[12]/\w+") if patterns is None else patterns
    scalars = words | numbers | st.integers(-(10**17), 10**17) | st.booleans() | st.none()
    options = st.dictionaries(
        words.filter(bool), scalars | st.lists(scalars, max_size=3).map(tuple), max_size=2
    )
    steps = st.builds(Step, words.filter(str.strip), options.map(lambda each: tuple(sorted(each.items()))))
    return Policy(
        name=draw(words.filter(str.strip)),
        default=default,
        pipeline=tuple(draw(st.lists(steps, min_size=1, max_size=3))),
        rules=tuple(draw(rules(name, default, patterns)) for name in listed),
        expect=Expect(draw(st.none() | numbers)),
        description=draw(st.just("") | words.filter(str.strip)),
    )


@st.composite
def plans(draw: st.DrawFn, addresses: Sequence[str]) -> Policy:
    """A policy that can be carried out: any bits, grids, ranges and groups, at some of the addresses."""
    edges = st.lists(st.floats(0, 999), min_size=1, max_size=4, unique=True)
    groups = st.none() | st.integers(1, 25) | edges.map(lambda each: tuple(sorted(each)))

    def setting(arg: str) -> Setting:
        more: dict[str, Any] = {} if arg == "weight" else {"groups": groups}
        bits = st.integers(2 if arg == "weight" else 4, 8)
        return draw(partial_specs(arg, bits=bits, **more) | st.just(FLOAT))

    default = Default(setting("weight"), setting("input"))
    listed = []
    for k in range(draw(st.integers(0, 3))):
        kind = draw(st.none() | kinds())
        weight = None if kind in ("attention", "softmax") else setting("weight")
        fed_by = draw(st.sampled_from([None, None, "skip_concat"]))
        at = (draw(st.sampled_from(addresses)),)
        listed.append(Rule(f"rule {k + 1}", at, kind, fed_by, weight, setting("input"), True))
    return Policy("drawn", default, (Step("plan-sites"),), tuple(listed))
