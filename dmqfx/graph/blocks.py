"""What is learned together: residual blocks, found by the graph's shape, and layers that are in none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import networkx as nx
from torch import SymInt, fx

from dmqfx.graph import ops
from dmqfx.graph.address import Address
from dmqfx.graph.modules import is_fixed, label
from dmqfx.graph.program import Program

__all__ = ["Block", "blocks", "single", "units"]


@dataclass(frozen=True, eq=False)
class Block:
    """out = x + f(x, ...), or with 1x1 convolutions of what makes up x instead of x; or a single layer.

    `inside` is in execution order and ends with the addition, or is the layer; `inputs` are the values that come in,
    constants left out; `arms` are the two that are added, or none.
    """

    inside: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    arms: tuple[fx.Node, ...]

    @property
    def out(self) -> fx.Node:
        """The addition, or the layer."""
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
    """The smallest residual blocks, none of which shares an operation with another, in execution order."""
    return _Search(program).blocks()


def units(program: Program) -> list[Block]:
    """Residual blocks of one module in a row, joined: a resnet block, the attentions and the feed-forward of a transformer.

    A unit begins where its first block does, and ends with the addition of its last. What its module alone computes
    of the timestep and the prompt is inside: a time projection, cross-attention's keys and values.
    """
    search, found = _Search(program), list[Block]()
    for block in search.blocks():
        if found and _goes_on(found[-1], block):
            block = _joined(found.pop(), block)
        found.append(block)
    return [search.with_own(unit) for unit in found]


def single(layer: fx.Node) -> Block:
    """A layer by itself."""
    reads = dict.fromkeys(read for read in layer.all_input_nodes if not is_fixed(read))
    return Block((layer,), tuple(reads), ())


def _goes_on(one: Block, two: Block) -> bool:
    """Whether a block of the same module takes on what another puts out, and nothing else does."""
    return one.at.path == two.at.path and one.out in two.inputs and set(one.out.users) <= set(two.inside)


def _joined(one: Block, two: Block) -> Block:
    inside = (*one.inside, *two.inside)
    inputs = dict.fromkeys(each for each in (*one.inputs, *two.inputs) if each not in inside)
    return Block(inside, tuple(inputs), two.arms)


class _Search:
    """The graph in the way that a search for blocks reads it.

    Sizes, which are numbers, are no way for what a tensor holds to get anywhere.
    """

    def __init__(self, program: Program) -> None:
        self._order, self._adds = list(program.graph.nodes), list(program.calls("add"))
        self._graph = program.digraph()
        self._sample = program.inputs.inputs[0].name
        self._sizes = {label(node) for node in self._order if isinstance(node.meta.get("val"), int | SymInt)}
        tensors = nx.restricted_view(self._graph, self._sizes, [])
        self._moving = nx.descendants(tensors, self._sample)

    def blocks(self) -> list[Block]:
        """The smallest residual blocks, in execution order."""
        found = [block for node in self._adds if (block := self.block(node)) is not None]
        taken, smallest = set[fx.Node](), set[Block]()
        for block in sorted(found, key=lambda each: len(each.inside)):  # what contains another is larger
            if taken.isdisjoint(block.inside):
                taken.update(block.inside)
                smallest.add(block)
        return [block for block in found if block in smallest]

    def block(self, out: fx.Node) -> Block | None:
        """The block that ends with an addition of two tensors of one shape, or None."""
        arms = (ops.args(out).get("self"), ops.args(out).get("other"))
        one, two = arms
        if not isinstance(one, fx.Node) or not isinstance(two, fx.Node) or not _alike(one, two):
            return None
        for trunk, branch in ((one, two), (two, one)):
            for sources, shortcut in _shortcuts(trunk):
                if (branched := self._between(sources, branch)) is None:
                    continue
                inside = branched | {*shortcut, out}
                return Block(*self._parts(inside), (one, two))
        return None

    def with_own(self, block: Block) -> Block:
        """The block and what its module computes for it alone, as far as that does not come from the sample."""
        inside, path = set(block.inside), block.at.path
        for node in reversed(self._order):
            if not node.users or not inside.issuperset(node.users) or not _within(node, path):
                continue
            if label(node) not in self._moving and label(node) not in self._sizes and not is_fixed(node):
                inside.add(node)
        ordered, inputs = self._parts(inside)
        return replace(block, inside=ordered, inputs=inputs)

    def _parts(self, inside: set[fx.Node]) -> tuple[tuple[fx.Node, ...], tuple[fx.Node, ...]]:
        """The operations in their order, and what they read of others."""
        ordered = tuple(node for node in self._order if node in inside)
        reads = dict.fromkeys(read for node in ordered for read in node.all_input_nodes)
        return ordered, tuple(read for read in reads if read not in inside and not is_fixed(read))

    def _between(self, sources: tuple[fx.Node, ...], branch: fx.Node) -> set[fx.Node] | None:
        """What makes the branch of the sources, or None if there is a way round them."""
        start, end = {label(source) for source in sources}, label(branch)
        if end in start or end not in self._moving:
            return None
        above = nx.ancestors(nx.restricted_view(self._graph, start | self._sizes, []), end) | {end}
        if self._sample in above:
            return None
        inside = above & self._moving
        whole = nx.restricted_view(self._graph, start, [])
        sizes = {
            each for each in nx.ancestors(whole, end) & self._sizes if nx.ancestors(whole, each) & inside
        }
        return {self._graph.nodes[each]["node"] for each in inside | sizes}


def _within(node: fx.Node, path: str) -> bool:
    """Whether an operation is of a module, or of one inside of it."""
    at = node.meta.get("address")
    return at is not None and f"{at.path}.".startswith(f"{path}.")


def _shortcuts(trunk: fx.Node) -> Iterator[tuple[tuple[fx.Node, ...], tuple[fx.Node, ...]]]:
    """(what the block begins with, what leads from there to the trunk): nothing, a 1x1 convolution, a sum of them."""
    yield (trunk,), ()
    if _pointwise(trunk):
        yield (_source(trunk),), (trunk,)
    if ops.is_call(trunk, "add"):
        parts = tuple(part for part in trunk.all_input_nodes if _pointwise(part))
        if len(parts) == 2:
            yield tuple(map(_source, parts)), (*parts, trunk)


def _source(layer: fx.Node) -> fx.Node:
    """What a layer reads, before an equivalent scale that stands in the graph."""
    node = ops.tensor(layer, "input")
    return (
        ops.tensor(node, "self") if ops.is_call(node, "div") and is_fixed(ops.args(node)["other"]) else node
    )


def _pointwise(node: fx.Node) -> bool:
    return ops.is_call(node, "conv2d") and set(ops.tensor(node, "weight").meta["val"].shape[2:]) == {1}


def _alike(one: fx.Node, two: fx.Node) -> bool:
    shapes = [getattr(node.meta.get("val"), "shape", None) for node in (one, two)]
    return shapes[0] is not None and shapes[0] == shapes[1] and len(shapes[0]) > 2
