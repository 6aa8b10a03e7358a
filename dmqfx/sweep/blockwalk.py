"""A walk over the graph, residual block by residual block: what comes into each, and what its layers have become."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias, overload

import torch
from torch import Tensor, fx

from dmqfx.graph.blocks import Block
from dmqfx.graph.modules import computed, constant, constant_of, is_fixed
from dmqfx.graph.program import Program
from dmqfx.graph.table import Table
from dmqfx.sweep.chunks import Chunk
from dmqfx.sweep.deploy import Deployed, pending_scales
from dmqfx.sweep.finite import finite, refuse_not_finite
from dmqfx.sweep.values import Pair, Values

__all__ = [
    "Arrival",
    "BlockWalk",
    "Learned",
    "Twin",
    "Twins",
    "forward",
    "quantized_twins",
    "stretches",
    "walk",
]

Learned: TypeAlias = Mapping[fx.Node, Mapping[str, Tensor]]
"""Constants of layers that are being learned, by argument."""


class Twin(Protocol):
    """What is computed in place of an operation, if it `differs`."""

    @property
    def differs(self) -> bool: ...

    def __call__(
        self, timestep: Tensor, value_of: Callable[[fx.Node], object], **instead: Tensor
    ) -> object: ...


Twins: TypeAlias = Mapping[fx.Node, Twin]


@dataclass(frozen=True, eq=False)
class Arrival:
    """What comes into a block on one chunk of rows."""

    values: Mapping[fx.Node, Pair]
    timestep: Tensor


Visit: TypeAlias = Callable[[Table, Block, Sequence[Arrival]], Table]
"""Gets the table so far, a block, and what comes into it by chunk; gives the table that counts from then on."""


def walk(
    program: Program,
    chunks: Sequence[Chunk],
    order: Sequence[Block],
    visit: Visit,
    *,
    memory: int,
    folder: Path | None = None,
) -> Table:
    """Compute up to each block in turn; what `visit` puts in the table counts from then on.

    Units: memory in bytes, for values that wait for a later operation; what is beyond it is set aside in a file.
    Raises: CalibrationError naming the first operation whose value is not finite, and the row.
    """
    return BlockWalk(program, chunks, order, memory=memory, folder=folder).run(visit)


class BlockWalk:
    """A walk, and how much memory it took.

    Units: memory in bytes, as for `walk`; `working` are the most bytes that the values of one stretch took on a
    chunk, both of each.
    """

    def __init__(
        self,
        program: Program,
        chunks: Sequence[Chunk],
        order: Sequence[Block],
        *,
        memory: int,
        folder: Path | None = None,
    ) -> None:
        self._program, self._chunks = program, chunks
        self._by_out = {block.out: block for block in order}
        self._stretches = list(stretches(program, order))
        self._uses = _Uses.of(self._stretches)
        self.values = Values(memory, self._uses.next, folder)
        self.working = 0

    @torch.no_grad()
    def run(self, visit: Visit) -> Table:
        """Walk up to the last block and its own values."""
        table = self._program.table
        try:
            for k, chunk in enumerate(self._chunks):
                for node in self._uses.by:
                    if node.op == "placeholder":
                        value = chunk.inputs[str(node.target)]
                        self.values.put(node, k, Pair(value, value))
            ends = [k for k, stretch in enumerate(self._stretches) if stretch[-1] in self._by_out]
            for number in range(max(ends, default=-1) + 1):
                self._uses.now, stretch = number, self._stretches[number]
                arrivals = _Arrivals(self.values, self._uses.outside(stretch), self._chunks)
                if (block := self._by_out.get(stretch[-1])) is not None:
                    table = visit(table, block, arrivals)
                self._compute(stretch, quantized_twins(self._program, table, stretch), arrivals)
        finally:
            self.values.close()
        return table

    def _compute(
        self, stretch: Sequence[fx.Node], twins: Mapping[fx.Node, Deployed], arrivals: _Arrivals
    ) -> None:
        """The values of a stretch on every chunk; those that are read later are kept."""
        for k, chunk in enumerate(self._chunks):
            found = _pairs(self._program, twins, stretch, arrivals[k])
            self.working = max(self.working, sum(map(_nbytes, found.values())))
            kept = {node: pair for node, pair in found.items() if self._uses.last(node) > self._uses.now}
            if not all(finite(tuple(pair.parts())) for pair in (*kept.values(), found[stretch[-1]])):
                for node, pair in found.items():
                    refuse_not_finite(node, pair, chunk.timestep, chunk.numbers)
            for node, pair in kept.items():
                self.values.put(node, k, pair)
            for node in arrivals.nodes:
                if self._uses.last(node) <= self._uses.now:
                    self.values.drop(node, k)


@dataclass(frozen=True, eq=False)
class _Arrivals(Sequence[Arrival]):
    """What comes into a stretch, by chunk; what was set aside is read anew whenever it is asked for."""

    values: Values
    nodes: Sequence[fx.Node]
    chunks: Sequence[Chunk]

    def __len__(self) -> int:
        return len(self.chunks)

    @overload
    def __getitem__(self, at: int) -> Arrival: ...

    @overload
    def __getitem__(self, at: slice) -> list[Arrival]: ...

    def __getitem__(self, at: int | slice) -> Arrival | list[Arrival]:
        if isinstance(at, slice):
            return [self[k] for k in range(len(self))[at]]
        k = range(len(self))[at]
        return Arrival({node: self.values.get(node, k) for node in self.nodes}, self.chunks[k].timestep)


@dataclass(eq=False)
class _Uses:
    """The stretches that read each node, by number, and the stretch whose turn it is."""

    by: dict[fx.Node, list[int]]
    now: int = 0

    @staticmethod
    def of(stretches: Sequence[Sequence[fx.Node]]) -> _Uses:
        by: dict[fx.Node, list[int]] = {}
        for k, stretch in enumerate(stretches):
            for read in dict.fromkeys(read for node in stretch for read in node.all_input_nodes):
                by.setdefault(read, []).append(k)
        return _Uses(by)

    def next(self, node: fx.Node, chunk: int) -> tuple[int, int]:
        """When a value is read next; -1 for never."""
        return next(((k, chunk) for k in self.by.get(node, ()) if k >= self.now), (-1, 0))

    def last(self, node: fx.Node) -> int:
        """When a value is read for the last time."""
        return self.by.get(node, [0])[-1]

    def outside(self, stretch: Sequence[fx.Node]) -> list[fx.Node]:
        """What the stretch whose turn it is reads of others."""
        inside = set(stretch)
        return [r for r, at in self.by.items() if self.now in at and not is_fixed(r) and r not in inside]


def quantized_twins(
    program: Program, table: Table, nodes: Sequence[fx.Node], *, held: bool = True
) -> dict[fx.Node, Deployed]:
    """The operations as they will be deployed, as far as the table knows; unpacked weights are `held` or not."""
    gammas = pending_scales(program, table)
    return {node: Deployed(program, table, node, gammas, held=held) for node in nodes}


def forward(
    program: Program,
    nodes: Sequence[fx.Node],
    given: Mapping[fx.Node, object],
    timestep: Tensor,
    twins: Twins | None = None,
    learned: Learned | None = None,
) -> dict[fx.Node, object]:
    """The values of operations in their order: those of the float network but for what has twins."""
    values: dict[fx.Node, object] = dict(given)

    def read(node: fx.Node) -> object:
        if node not in values:
            values[node] = constant_of(node, lambda target: constant(program.gm, target)).detach()
        return values[node]

    for node in nodes:
        twin, own = (twins or {}).get(node), (learned or {}).get(node, {})
        quantized = twin is not None and (twin.differs or own)
        values[node] = twin(timestep, read, **own) if twin and quantized else computed(node, read)
    return values


def _pairs(
    program: Program, twins: Mapping[fx.Node, Deployed], nodes: Sequence[fx.Node], arrival: Arrival
) -> dict[fx.Node, Pair]:
    real = forward(program, nodes, {n: pair.real for n, pair in arrival.values.items()}, arrival.timestep)
    same = all(pair.same for pair in arrival.values.values())
    if same and not any(twin.differs for twin in twins.values()):
        return {node: Pair(real[node], real[node]) for node in nodes}
    given = {n: pair.quantized for n, pair in arrival.values.items()}
    quantized = forward(program, nodes, given, arrival.timestep, twins)
    return {node: Pair(real[node], quantized[node]) for node in nodes}


def stretches(program: Program, order: Sequence[Block]) -> Iterator[tuple[fx.Node, ...]]:
    """The operations in an order in which each block's follow each other: a block, or what lies between two."""
    block_of = {node: block for block in order for node in block.inside}
    between: list[fx.Node] = []
    for node in program.graph.nodes:
        block = block_of.get(node)
        if block is not None and node is block.out:
            if between:
                yield tuple(between)
            between = []
            yield block.inside
        elif block is None and node.op in ("call_function", "call_module") and not is_fixed(node):
            between.append(node)
    if between:
        yield tuple(between)


def _nbytes(pair: Pair) -> int:
    return sum(part.nbytes for part in pair.parts() if isinstance(part, Tensor))
