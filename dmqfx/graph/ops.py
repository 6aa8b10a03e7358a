"""Operators by their schema names: the only place that knows how a call spells its arguments."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from functools import cache

import torch
from torch import fx
from torch._ops import OpOverload

__all__ = ["args", "arguments_of", "call_spelling", "is_call", "name", "overload", "parameters", "tensor"]

_PYTHON: Mapping[Callable[..., object], tuple[str, ...]] = {
    operator.getitem: ("self", "index"),
    operator.add: ("self", "other"),
    operator.sub: ("self", "other"),
    operator.mul: ("self", "other"),
    operator.floordiv: ("self", "other"),
    operator.mod: ("self", "other"),
    operator.neg: ("self",),
}


def overload(qualified: str) -> OpOverload:
    """The operator behind `namespace.name.overload`, such as `aten.conv2d.default`.

    Raises: ValueError if there is none.
    """
    namespace, _, rest = qualified.partition(".")
    packet, _, variant = rest.partition(".")
    try:
        found = getattr(getattr(getattr(torch.ops, namespace), packet), variant or "default")
    except AttributeError:
        found = None
    if not isinstance(found, OpOverload):
        raise ValueError(f"there is no operator {qualified!r} in this torch {torch.__version__}")
    return found


def name(node: fx.Node) -> str:
    """The operator's bare name (`conv2d`, `add`, `getitem`), the class name of a called module, or "" for no call."""
    if node.op == "call_module":
        return str(node.target).partition(".")[0]
    if node.op != "call_function":
        return ""
    if isinstance(node.target, OpOverload):
        return _bare(node.target)
    return str(getattr(node.target, "__name__", node.target))


@cache  # asked of every node by every rule
def _bare(target: OpOverload) -> str:
    return target._schema.name.partition("::")[2]


def is_call(node: object, *names: str) -> bool:
    """Whether this is a call of one of the named operators.

    Example:
        >>> graph = fx.Graph()
        >>> x = graph.placeholder("x")
        >>> is_call(graph.call_function(torch.ops.aten.silu.default, (x,)), "silu", "gelu"), is_call(x, "silu")
        (True, False)
    """
    return isinstance(node, fx.Node) and name(node) in names and bool(names)


def parameters(node: fx.Node) -> tuple[str, ...]:
    """The argument names of a call, in schema order."""
    if isinstance(node.target, OpOverload):
        return tuple(argument.name for argument in node.target._schema.arguments)
    if node.op == "call_function" and callable(node.target):
        return _PYTHON.get(node.target, tuple(f"arg{k}" for k in range(len(node.args))))
    return tuple(f"arg{k}" for k in range(len(node.args)))


def arguments_of(name: str) -> frozenset[str]:
    """The argument names of every overload of an operator; none where no operator of that name is registered."""
    packets = (getattr(namespace, name, None) for namespace in (torch.ops.aten, torch.ops.dmqfx))
    overloads = (getattr(packet, each) for packet in packets if packet for each in packet.overloads())
    named = {argument.name for overload in overloads for argument in overload._schema.arguments}
    python = {arg for function, args in _PYTHON.items() if function.__name__ == name for arg in args}
    return frozenset(named | python)


def args(node: fx.Node) -> dict[str, fx.node.Argument]:
    """Every argument of a call by schema name, defaults filled in.

    Example:
        >>> graph = fx.Graph()
        >>> x = graph.placeholder("x")
        >>> args(graph.call_function(torch.ops.aten.conv2d.default, (x, x)))["padding"]
        [0, 0]
    """
    if not isinstance(node.target, OpOverload):
        return {**dict(zip(parameters(node), node.args, strict=False)), **node.kwargs}
    found: dict[str, fx.node.Argument] = {}
    for k, argument in enumerate(node.target._schema.arguments):
        if k < len(node.args) and not argument.kwarg_only:
            found[argument.name] = node.args[k]
        else:
            found[argument.name] = node.kwargs.get(argument.name, default_of(argument))
    return found


def tensor(node: fx.Node, arg: str) -> fx.Node:
    """The node that a call reads as an argument.

    Raises: KeyError if the argument is absent or not computed by a node.
    """
    value = args(node).get(arg)
    if not isinstance(value, fx.Node):
        raise KeyError(f"{node.meta.get('address', node.name)} has no tensor {arg!r}")
    return value


def default_of(argument: torch.Argument) -> fx.node.Argument:
    """A schema default with `int[2] padding=0` spelled out as [0, 0]."""
    value: fx.node.Argument = argument.default_value
    length = getattr(argument, "N", None)  # how often a single number is repeated
    return [value] * length if length and isinstance(value, int) else value


def call_spelling(
    target: OpOverload, named: Mapping[str, fx.node.Argument]
) -> tuple[tuple[fx.node.Argument, ...], dict[str, fx.node.Argument]]:
    """Canonical (args, kwargs) of a call: positional in schema order, trailing defaults dropped, no default keywords.

    Raises: TypeError for a name that the schema does not have or a missing argument.
    """
    unknown = set(named) - {argument.name for argument in target._schema.arguments}
    if unknown:
        raise TypeError(f"{target} has no argument {sorted(unknown)}; it takes {target._schema}")
    positional: list[fx.node.Argument] = []
    keywords: dict[str, fx.node.Argument] = {}
    keep = 0
    for argument in target._schema.arguments:
        if argument.name not in named and not argument.has_default_value():
            raise TypeError(f"{target} needs {argument.name!r}: {target._schema}")
        value = named.get(argument.name, default_of(argument))
        differs = not argument.has_default_value() or not _same(value, default_of(argument))
        if argument.kwarg_only:
            keywords.update({argument.name: value} if differs else {})
            continue
        positional.append(value)
        keep = len(positional) if differs else keep
    return tuple(positional[:keep]), keywords


def _same(value: fx.node.Argument, default: fx.node.Argument) -> bool:
    if isinstance(value, fx.Node) or isinstance(default, fx.Node):
        return value is default
    if isinstance(value, (list, tuple)) and isinstance(default, (list, tuple)):
        return len(value) == len(default) and all(map(_same, value, default))
    return type(value) is type(default) and value == default
