"""Hoisted values: marks in a graph, what is computed between them, and whether they say what they depend on."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator

from torch import fx

from dmqfx.graph import ops
from dmqfx.graph.modules import label

__all__ = ["between", "hoisted_in", "is_size", "is_view", "misplaced", "roots"]

_ON_SIZES = (operator.add, operator.floordiv, operator.mod, operator.mul, operator.neg, operator.sub)


def hoisted_in(graph: fx.Graph) -> list[fx.Node]:
    """The marks `hoisted(x, by)` of a graph, in execution order."""
    return [node for node in graph.nodes if ops.is_call(node, "hoisted")]


def roots(mark: fx.Node) -> frozenset[str]:
    """The inputs that a hoisted value says it is computed from, by way of other hoisted values too."""
    found = frozenset[str]()
    for read in _by(mark):
        found |= roots(read) if ops.is_call(read, "hoisted") else {str(read.target)}
    return found


def between(ends: Iterable[fx.Node], stops: Iterable[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
    """The nodes from which the ends are computed, themselves among them, and the stops and inputs that those read.

    Nothing behind a stop or an input is looked at; both lists are in execution order.
    """
    stopping, inner, waiting = set(stops), set[fx.Node](), list(ends)
    reads = {node for node in waiting if node.op == "placeholder"}
    while waiting:
        node = waiting.pop()
        if node in inner or node.op == "placeholder":
            continue
        inner.add(node)
        ahead = [read for read in node.all_input_nodes if read in stopping or read.op == "placeholder"]
        reads.update(ahead)
        waiting += set(node.all_input_nodes) - set(ahead)
    return sorted(inner), sorted(reads)


def is_size(node: fx.Node) -> bool:
    """Whether this is a number made of the sizes of inputs: it is the same whatever is in them."""
    if ops.is_call(node, "sym_size"):
        return ops.tensor(node, "self").op == "placeholder"
    read = node.all_input_nodes
    return node.op == "call_function" and node.target in _ON_SIZES and bool(read) and all(map(is_size, read))


def is_view(node: fx.Node) -> bool:
    """Whether this may be the memory of what it reads, or a part of it."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return node.target is operator.getitem
    return any(argument.alias_info is not None for argument in schema.arguments)


def misplaced(graph: fx.Graph) -> Iterator[tuple[fx.Node, str]]:
    """Marks whose value depends on something that they do not name, and why."""
    stops = [*hoisted_in(graph), *filter(is_size, graph.nodes)]
    for mark in hoisted_in(graph):
        _, reads = between([ops.tensor(mark, "x")], stops)
        named = _by(mark)
        beyond = [label(read) for read in reads if read not in named and not is_size(read)]
        if beyond:
            yield (
                mark,
                f"is computed from {', '.join(beyond)} too, not from {', '.join(map(label, named))} alone",
            )


def _by(mark: fx.Node) -> list[fx.Node]:
    found = ops.args(mark)["by"]
    return [node for node in found if isinstance(node, fx.Node)] if isinstance(found, (list, tuple)) else []
