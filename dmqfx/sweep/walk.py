"""The walk: topological order, segment by segment, chunk by chunk, two values of everything."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map_only

from dmqfx.graph.modules import call_with, constant
from dmqfx.graph.program import Program
from dmqfx.graph.table import Table
from dmqfx.sweep.deploy import Deployed
from dmqfx.sweep.turn import Batch, Reader, Turn, turns
from dmqfx.sweep.values import Pair, Values

__all__ = ["Segment", "Walk"]

Visit = Callable[[Turn], Table]


@dataclass(frozen=True, eq=False)
class Segment:
    """Nodes up to the next tensor that planned layers read, that tensor included."""

    nodes: tuple[fx.Node, ...]
    source: fx.Node | None
    turns: tuple[tuple[int, tuple[Reader, ...]], ...] = ()


@dataclass(eq=False)
class Walk:
    """One pass over a program's graph with the float and the quantized-so-far value of every live tensor.

    Units: budget in bytes; a chunk is a batch of calibration rows by placeholder name.
    """

    program: Program
    chunks: Sequence[Mapping[str, Tensor]]
    budget: int
    seed: int = 0
    table: Table = field(init=False)
    outputs: list[tuple[Tensor, Tensor]] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.table = self.program.table
        self.segments = list(segments(self.program))
        self._uses = _uses(self.segments)
        self._here = 0
        self.values = Values(self._next_use, self.budget)

    @torch.no_grad()
    def run(self, visit: Visit) -> Table:
        """Walk; `visit` is called for every turn, and what it puts in the table counts from then on."""
        try:
            for self._here, segment in enumerate(self.segments):
                for k in range(len(self.chunks)):
                    self._compute(segment, k)
                self._drop_used()
                for axis, readers in segment.turns:
                    assert segment.source is not None
                    turn = Turn(
                        self.program, self.table, segment.source, axis, readers,
                        _Batches(self, segment.source), self.seed,
                    )  # fmt: skip
                    self.table = visit(turn)
        finally:
            self.values.close()
        return self.table

    def _compute(self, segment: Segment, k: int) -> None:
        deployed = Deployed(self.program, self.table, self._timestep(k))
        local: dict[fx.Node, Pair] = {}

        def pair_of(node: fx.Node) -> Pair:
            if node.op == "get_attr":
                value = constant(self.program.gm, str(node.target))
                return Pair(value, value)
            return local[node] if node in local else self.values.get(node, k)

        for node in segment.nodes:
            local[node] = self._pair(node, k, pair_of, deployed)
        for node in segment.nodes:
            if self._next_use(node) > self._here or node is segment.source:
                self.values.put(node, k, _owned(local[node]))

    def _pair(self, node: fx.Node, k: int, pair_of: Callable[[fx.Node], Pair], deployed: Deployed) -> Pair:
        if node.op == "placeholder":
            value = self.chunks[k][str(node.target)]
            return Pair(value, value)
        if node.op == "output":
            pairs = [pair_of(n) for n in node.all_input_nodes]
            found = Pair(tuple(p.real for p in pairs), tuple(p.quantized for p in pairs))
            self.outputs.append((pairs[0].real, pairs[0].quantized))  # type: ignore[arg-type]
            return found
        assert callable(node.target)
        real = call_with(node.target, node.args, node.kwargs, lambda n: pair_of(n).real)
        if not deployed.changes(node) and all(pair_of(n).same for n in node.all_input_nodes):
            return Pair(real, real)
        return Pair(real, deployed.call(node, lambda n: pair_of(n).quantized))

    def _timestep(self, k: int) -> Tensor:
        return self.chunks[k]["timestep"]

    def _next_use(self, node: fx.Node) -> int:
        return next((at for at in self._uses.get(node, ()) if at > self._here), -1)

    def _drop_used(self) -> None:
        source = self.segments[self._here].source
        self.values.drop([n for n in list(self.values._held) if self._next_use(n) < 0 and n is not source])


class _Batches(Sequence[Batch]):
    """The chunks of one tensor, read from the store when asked for."""

    def __init__(self, walk: Walk, source: fx.Node) -> None:
        self._walk, self._source = walk, source

    def __len__(self) -> int:
        return len(self._walk.chunks)

    def __getitem__(self, k: int) -> Batch:  # type: ignore[override]
        if k >= len(self):
            raise IndexError(k)
        pair = self._walk.values.get(self._source, k)
        assert isinstance(pair.real, Tensor) and isinstance(pair.quantized, Tensor)
        return Batch(pair.real, pair.quantized, self._walk._timestep(k))


def segments(program: Program) -> Iterator[Segment]:
    """The graph cut behind every tensor that planned layers read."""
    planned = turns(program)
    nodes: list[fx.Node] = []
    for node in program.graph.nodes:
        if node.op == "get_attr":
            continue
        nodes.append(node)
        if node in planned:
            yield Segment(tuple(nodes), node, tuple(planned[node]))
            nodes = []
    if nodes:
        yield Segment(tuple(nodes), None)


def _uses(parts: Sequence[Segment]) -> dict[fx.Node, list[int]]:
    """The segments in which each value is read."""
    found: dict[fx.Node, list[int]] = {}
    for k, segment in enumerate(parts):
        for node in segment.nodes:
            for read in node.all_input_nodes:
                if read.op != "get_attr" and (not found.get(read) or found[read][-1] != k):
                    found.setdefault(read, []).append(k)
    return found


def _owned(pair: Pair) -> Pair:
    """The pair in memory of its own, so that a view does not keep what it was cut from."""

    def own(tensor: Tensor) -> Tensor:
        part = tensor.untyped_storage().nbytes() > tensor.nbytes
        return tensor.clone() if part else tensor

    real = tree_map_only(Tensor, own, pair.real)
    return Pair(real, real if pair.same else tree_map_only(Tensor, own, pair.quantized))
