"""The walk: topological order, segment by segment, chunk by chunk, two values of everything."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, fx

from dmqfx.graph.modules import computed, constant, constant_of
from dmqfx.graph.program import Program
from dmqfx.graph.table import Table
from dmqfx.sweep.chunks import Chunk
from dmqfx.sweep.deploy import Deployed, pending_scales
from dmqfx.sweep.finite import finite, refuse_not_finite
from dmqfx.sweep.rows import Batch
from dmqfx.sweep.schedule import TURN, Moment, Schedule, Segment
from dmqfx.sweep.turn import Turn
from dmqfx.sweep.values import Pair, Values

__all__ = ["Walk"]

Visit: TypeAlias = Callable[[Turn], Table]


class Walk:
    """One pass over a program's graph with the float and the quantized-so-far value of every live tensor.

    Where processes share the chunks, `total` counts the rows of all, and `gather` joins their tensors.

    Units: memory in bytes, for values that are kept from one operation to a later segment's; what is beyond
    it is set aside in a file in `folder`. The result does not depend on it. `working` is beside it, for
    computing a chunk.
    """

    def __init__(
        self,
        program: Program,
        chunks: Iterable[Chunk],
        *,
        memory: int,
        working: int = 0,
        total: int = 0,
        seed: int = 0,
        folder: Path | None = None,
        gather: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> None:
        self._program, self._chunks, self._seed = program, chunks, seed
        self.schedule = Schedule(program)
        self.table = program.table
        self._total, self._working, self._gather = total, working, gather
        self._now: Moment = (0, 0)
        self._rows: list[tuple[Tensor, int]] = []
        self.values = Values(memory, self._next_use, folder)

    @torch.no_grad()
    def run(self, visit: Visit, outputs: list[Pair] | None = None) -> Table:
        """Walk; `visit` is called for every turn, and what it puts in the table counts from then on.

        The walk ends with the last turn, unless there is a list for the program's outputs, chunk by chunk.

        Raises: CalibrationError naming the first operation whose value is not finite, and the row.
        """
        try:
            self._load()
            for k, segment in enumerate(self.schedule.segments):
                if segment.source is not None or outputs is not None:
                    self._compute(k, segment, outputs)
                self._decide(k, segment, visit)
        finally:
            self.values.close()
        return self.table

    def _load(self) -> None:
        """Keep the inputs of every chunk."""
        places = [node for node in self._program.graph.nodes if node.op == "placeholder"]
        for k, chunk in enumerate(self._chunks):
            self._rows.append((chunk.timestep, chunk.first))
            for node in places:
                if self.schedule.next_use(node, k, self._now):
                    value = chunk.inputs[str(node.target)]
                    self.values.put(node, k, Pair(value, value))

    def _compute(self, number: int, segment: Segment, outputs: list[Pair] | None) -> None:
        """The segment's values on every chunk; those that are read later are kept."""
        step = _Step(self._program, self.table, self.schedule, segment)
        for k, (timestep, first) in enumerate(self._rows):
            self._now = (number, k)
            kept = partial(self.values.get, chunk=k)
            for node, pair in step.run(kept, timestep):
                needed = self.schedule.next_use(node, k, (number, k + 1))
                if not needed and node.op != "output":
                    continue
                if not finite(tuple(pair.parts())):
                    for at, culprit in step.run(kept, timestep):
                        refuse_not_finite(at, culprit, timestep, range(first, first + len(timestep)))
                if needed:
                    self.values.put(node, k, pair)
                elif outputs is not None:
                    outputs.append(pair)
            self._forget(step.read, k, (number, k + 1))

    def _forget(self, nodes: Iterable[fx.Node], k: int, then: Moment) -> None:
        """Drop what nobody reads from then on."""
        for node in nodes:
            if self.schedule.next_use(node, k, then) is None:
                self.values.drop(node, k)

    def _next_use(self, node: fx.Node, chunk: int) -> Moment:
        return self.schedule.next_use(node, chunk, self._now) or (-1, 0)

    def _decide(self, number: int, segment: Segment, visit: Visit) -> None:
        """The segment's turns."""
        self._now = (number, TURN)
        if segment.source is None:
            return
        tensor = _Tensor(self.values, segment.source, self._rows, self._total, self._working, self._gather)
        for axis, readers in segment.turns:
            turn = Turn(self._program, self.table, segment.source, axis, readers, tensor, self._seed)
            self.table = visit(turn)
            self.values.release()
        for k in range(len(self._rows)):
            self._forget([segment.source], k, (number + 1, 0))


class _Step:
    """One segment with what is known when it is computed; weights are unpacked once for all chunks."""

    def __init__(self, program: Program, table: Table, schedule: Schedule, segment: Segment) -> None:
        self._program, self._schedule, self._segment = program, schedule, segment
        gammas = pending_scales(program, table)
        self._deployed = {node: Deployed(program, table, node, gammas) for node in segment.nodes}
        self._constants: dict[fx.Node, Pair] = {}
        reads = (read for node in segment.nodes for read in schedule.reads(node))
        self.read = [read for read in dict.fromkeys(reads) if read not in self._deployed]

    def run(self, kept: Callable[[fx.Node], Pair], timestep: Tensor) -> Iterator[tuple[fx.Node, Pair]]:
        """Every operation with its values on one chunk; what none of them reads any more is let go."""
        local: dict[fx.Node, Pair] = {}
        for node in self._segment.nodes:
            for read in self._schedule.reads(node):
                if read not in local:
                    local[read] = kept(read)
            pair = self._pair(node, local, timestep)
            local[node] = pair
            yield node, pair
            for read in self._segment.spent.get(node, ()):
                del local[read]

    def _pair(self, node: fx.Node, local: Mapping[fx.Node, Pair], timestep: Tensor) -> Pair:
        pairs = {read: local.get(read) or self._constant(read) for read in node.all_input_nodes}
        deployed = self._deployed[node]
        real = computed(node, lambda read: pairs[read].real)
        if not deployed.differs and all(pair.same for pair in pairs.values()):
            return Pair(real, real)
        if deployed.differs:
            return Pair(real, deployed(timestep, lambda read: pairs[read].quantized))
        return Pair(real, computed(node, lambda read: pairs[read].quantized))

    def _constant(self, node: fx.Node) -> Pair:
        if node not in self._constants:
            value = constant_of(node, lambda target: constant(self._program.gm, target))
            self._constants[node] = Pair(value, value)
        return self._constants[node]


class _Tensor:
    """The tensor of a turn, read chunk by chunk from what is kept."""

    def __init__(
        self,
        values: Values,
        node: fx.Node,
        rows: Sequence[tuple[Tensor, int]],
        total: int,
        working: int,
        gather: Callable[[Tensor], Tensor],
    ) -> None:
        self._values, self._node, self._rows = values, node, rows
        self.total, self.working, self.gather = total, working, gather
        self.reserve = values.reserve

    def __iter__(self) -> Iterator[Batch]:
        for k, (timestep, first) in enumerate(self._rows):
            pair = self._values.get(self._node, k)
            assert isinstance(pair.real, Tensor)
            assert isinstance(pair.quantized, Tensor)
            yield Batch(pair.real, pair.quantized, timestep, first)
