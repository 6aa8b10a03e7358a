"""Residual blocks: what stands between a tensor and the addition that takes it back, found by the graph's shape."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import networkx as nx
from torch import fx

from dmqfx.graph import ops
from dmqfx.graph.address import Address
from dmqfx.graph.modules import is_fixed, label
from dmqfx.graph.program import Program

__all__ = ["Block", "blocks"]


@dataclass(frozen=True, eq=False)
class Block:
    """out = x + f(x, ...), or with 1x1 convolutions of what makes up x instead of x.

    `inside` is in execution order and ends with the addition; `inputs` are the values that come in, constants
    left out; `arms` are the two that are added.
    """

    inside: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    arms: tuple[fx.Node, fx.Node]

    @property
    def out(self) -> fx.Node:
        """The addition."""
        return self.inside[-1]

    @property
    def at(self) -> Address:
        """Its address, by which the block is known."""
        found: Address = self.out.meta["address"]
        return found

    @property
    def read_outside(self) -> fx.Node | None:
        """A value of the inside, other than the block's own, that something else reads."""
        own = set(self.inside)
        return next((node for node in self.inside[:-1] if set(node.users) - own), None)


def blocks(program: Program) -> list[Block]:
    """The residual blocks that contain no other, in execution order."""
    graph = program.digraph()
    sample = program.inputs.inputs[0].name
    moving = nx.descendants(graph, sample)
    found = [block for node in program.calls("add") if (block := _block(program, graph, sample, moving, node))]
    outs = {block.out for block in found}
    return [block for block in found if not outs & set(block.inside[:-1])]


def _block(
    program: Program, graph: nx.DiGraph[str], sample: str, moving: set[str], out: fx.Node
) -> Block | None:
    """The block that ends with an addition of two tensors of one shape, or None."""
    arms = (ops.args(out).get("self"), ops.args(out).get("other"))
    one, two = arms
    if not isinstance(one, fx.Node) or not isinstance(two, fx.Node) or not _alike(one, two):
        return None
    for trunk, branch in ((one, two), (two, one)):
        for sources, shortcut in _shortcuts(trunk):
            behind = nx.restricted_view(graph, [label(source) for source in sources], [])
            if label(branch) not in behind or label(branch) not in moving:
                continue
            above = nx.ancestors(behind, label(branch)) | {label(branch)}
            if sample in above:  # a way round the sources
                continue
            inside = {graph.nodes[each]["node"] for each in above & moving} | {*shortcut, out}
            ordered = tuple(node for node in program.graph.nodes if node in inside)
            reads = dict.fromkeys(read for node in ordered for read in node.all_input_nodes)
            inputs = tuple(read for read in reads if read not in inside and not is_fixed(read))
            return Block(ordered, inputs, (one, two))
    return None


def _shortcuts(trunk: fx.Node) -> Iterator[tuple[tuple[fx.Node, ...], tuple[fx.Node, ...]]]:
    """(what the block begins with, what leads from there to the trunk): nothing, a 1x1 convolution, a sum of them."""
    yield (trunk,), ()
    if _pointwise(trunk):
        yield (ops.tensor(trunk, "input"),), (trunk,)
    if ops.is_call(trunk, "add"):
        parts = tuple(part for part in trunk.all_input_nodes if _pointwise(part))
        if len(parts) == 2:
            yield tuple(ops.tensor(part, "input") for part in parts), (*parts, trunk)


def _pointwise(node: fx.Node) -> bool:
    return ops.is_call(node, "conv2d") and set(ops.tensor(node, "weight").meta["val"].shape[2:]) == {1}


def _alike(one: fx.Node, two: fx.Node) -> bool:
    shapes = [getattr(node.meta.get("val"), "shape", None) for node in (one, two)]
    return shapes[0] is not None and shapes[0] == shapes[1] and len(shapes[0]) > 2
