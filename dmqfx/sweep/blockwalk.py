"""A walk over the graph, residual block by residual block: what comes into each, and what its layers have become."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, fx

from dmqfx.graph.blocks import Block
from dmqfx.graph.modules import computed, constant, constant_of, is_fixed
from dmqfx.graph.program import Program
from dmqfx.graph.table import Table
from dmqfx.sweep.chunks import Chunk
from dmqfx.sweep.deploy import Deployed, pending_scales
from dmqfx.sweep.values import Pair, Values

__all__ = ["Arrival", "Learned", "forward", "quantized_twins", "walk"]

Learned = Mapping[fx.Node, Mapping[str, Tensor]]
"""Constants of layers that are being learned, by argument."""


@dataclass(frozen=True, eq=False)
class Arrival:
    """What comes into a block on one chunk of rows."""

    values: Mapping[fx.Node, Pair]
    timestep: Tensor


@torch.no_grad()
def walk(
    program: Program,
    chunks: Sequence[Chunk],
    order: Sequence[Block],
    visit: Callable[[Table, Block, list[Arrival]], Table],
    *,
    memory: int,
    folder: Path | None = None,
) -> Table:
    """Compute up to each block in turn; what `visit` puts in the table counts from then on.

    Units: memory in bytes, for values that wait for a later operation; what is beyond it is set aside in a file.
    """
    table, stretches = program.table, list(_stretches(program, order))
    uses = _Uses.of(stretches)
    by_out, values = {block.out: block for block in order}, Values(memory, uses.next, folder)
    try:
        for k, chunk in enumerate(chunks):
            for node in uses.by:
                if node.op == "placeholder":
                    value = chunk.inputs[str(node.target)]
                    values.put(node, k, Pair(value, value))
        last = max((k for k, stretch in enumerate(stretches) if stretch[-1] in by_out), default=-1)
        for uses.now, stretch in enumerate(stretches[: last + 1]):
            outside = uses.outside(stretch)
            if (block := by_out.get(stretch[-1])) is not None:
                table = visit(
                    table, block, [_arrival(values, outside, chunks, k) for k in range(len(chunks))]
                )
            twins = quantized_twins(program, table, stretch)
            for k in range(len(chunks)):
                found = _pairs(program, twins, stretch, _arrival(values, outside, chunks, k))
                for node, pair in found.items():
                    if uses.last(node) > uses.now:
                        values.put(node, k, pair)
                for node in outside:
                    if uses.last(node) <= uses.now:
                        values.drop(node, k)
    finally:
        values.close()
    return table


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


def _arrival(values: Values, outside: Sequence[fx.Node], chunks: Sequence[Chunk], k: int) -> Arrival:
    return Arrival({node: values.get(node, k) for node in outside}, chunks[k].timestep)


def quantized_twins(program: Program, table: Table, nodes: Sequence[fx.Node]) -> dict[fx.Node, Deployed]:
    """The operations as they will be deployed, as far as the table knows."""
    gammas = pending_scales(program, table)
    return {node: Deployed(program, table, node, gammas) for node in nodes}


def forward(
    program: Program,
    nodes: Sequence[fx.Node],
    given: Mapping[fx.Node, object],
    timestep: Tensor,
    twins: Mapping[fx.Node, Deployed] | None = None,
    learned: Learned | None = None,
) -> dict[fx.Node, object]:
    """The values of operations in their order: those of the float network, or with `twins` of the quantized one."""
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


def _stretches(program: Program, order: Sequence[Block]) -> Iterator[tuple[fx.Node, ...]]:
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
