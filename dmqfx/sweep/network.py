"""The whole network, forward and back, in the memory that there is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, fx
from torch.utils.checkpoint import checkpoint

from dmqfx.graph.blocks import blocks
from dmqfx.graph.modules import fixed_nodes
from dmqfx.graph.program import Program
from dmqfx.sweep.blockwalk import Learned, Twins, forward, stretches
from dmqfx.sweep.chunks import Chunk
from dmqfx.sweep.finite import refuse_not_finite
from dmqfx.sweep.values import Pair
from dmqfx.sweep.wayback import Peak, remembered

__all__ = ["Network", "Room"]


@dataclass(frozen=True)
class Room:
    """How many rows are computed at a time, and whether sparingly.

    Units: nbytes that they keep for their way back, or that work on them was seen to take.
    """

    sparing: bool
    rows: int
    nbytes: int


class Network:
    """The float and the quantized network, from inputs to outputs.

    With `sparing`, what a residual block, or what lies between two, computes is not kept for the way back but
    computed again.
    """

    def __init__(self, program: Program, *, sparing: bool = False) -> None:
        self._program, self.sparing = program, sparing
        self._stretches = [
            [node for node in stretch if node.op != "output"]
            for stretch in stretches(program, [b for b in blocks(program) if b.read_outside is None])
        ]
        self._out = next(node for node in program.graph.nodes if node.op == "output").all_input_nodes
        self._needed = self._later()

    @property
    def nodes(self) -> list[fx.Node]:
        """All operations."""
        return [node for stretch in self._stretches for node in stretch]

    def __call__(self, chunk: Chunk, twins: Twins | None = None, learned: Learned | None = None) -> Tensor:
        """The outputs, side by side: those of the float network but for the operations that have twins.

        Shapes: float [B, numbers of a row].
        """
        spare = self.sparing and torch.is_grad_enabled()
        compute = partial(checkpoint, self._computed, use_reentrant=False) if spare else self._computed
        values = self._given(chunk)
        for number in range(len(self._stretches)):
            values = compute(number, values, chunk, twins, learned)
        return torch.cat([_rows(values[node]) for node in self._out], 1)

    def blame(self, chunk: Chunk, twins: Twins, learned: Learned) -> None:
        """Raise for the first operation whose value is not finite.

        Raises: CalibrationError naming it and the row.
        """
        real = forward(self._program, self.nodes, self._given(chunk), chunk.timestep)
        quantized = forward(self._program, self.nodes, self._given(chunk), chunk.timestep, twins, learned)
        for node in self.nodes:
            refuse_not_finite(node, Pair(real[node], quantized[node]), chunk.timestep, chunk.numbers)

    def room(
        self, chunk: Chunk, memory: int, twins: Twins | None = None, learned: Learned | None = None
    ) -> Room:
        """How a batch like this one is computed forward and back in a memory budget.

        What one row keeps and what two keep tell apart what is kept for each row and for all.

        Units: memory in bytes.
        """
        rows = len(chunk.timestep)
        one, two = (self.kept(chunk.part(slice(k)), twins, learned) for k in (1, min(2, rows)))
        (whole, whole_each), (spared, spared_each) = (
            (first, both - first if both > first else first) for first, both in zip(one, two, strict=True)
        )
        sparing = whole + (rows - 1) * whole_each > memory
        first, each = (spared, spared_each) if sparing else (whole, whole_each)
        fit = max(1, min(rows, 1 + (memory - first) // max(1, each)))
        return Room(sparing, fit, first + (fit - 1) * each)

    def tried(self, room: Room, chunk: Chunk, memory: int, work: Callable[[Chunk], object]) -> Room:
        """The room as work forward and back shows it on one row and on two; `sparing` is set as it says.

        What it is tried with may take more than the memory: then one row does.

        Units: memory in bytes.
        """
        self.sparing, rows = room.sparing, len(chunk.timestep)
        one, two = (_peak(work, chunk.part(slice(k))) for k in (1, min(2, rows)))
        each = max(1, two - one if two > one else one)
        fit = max(1, min(rows, 1 + (memory - one) // each))
        if fit < rows and not room.sparing:
            return self.tried(replace(room, sparing=True), chunk, memory, work)
        return Room(room.sparing, fit, one + (fit - 1) * each)

    def kept(
        self, chunk: Chunk, twins: Twins | None = None, learned: Learned | None = None
    ) -> tuple[int, int]:
        """Bytes that the chunk keeps for its way back: all of it, and with `sparing`."""
        values, whole, most, between = self._given(chunk), 0, 0, dict[int, Tensor]()
        for number in range(len(self._stretches)):
            with remembered() as memory, torch.enable_grad():
                found = self._computed(number, values, chunk, twins, learned)
            values = {node: _cut(value) for node, value in found.items()}
            whole, most = whole + memory.nbytes, max(most, memory.nbytes)
            between |= {value.data_ptr(): value for value in values.values() if isinstance(value, Tensor)}
        return whole, most + sum(value.nbytes for value in between.values())

    def _given(self, chunk: Chunk) -> dict[fx.Node, object]:
        places = (node for node in self._program.graph.nodes if node.op == "placeholder")
        return {node: chunk.inputs[str(node.target)] for node in places}

    def _computed(
        self,
        number: int,
        values: Mapping[fx.Node, object],
        chunk: Chunk,
        twins: Twins | None,
        learned: Learned | None,
    ) -> dict[fx.Node, object]:
        """The values that are still read behind a stretch."""
        found = forward(self._program, self._stretches[number], values, chunk.timestep, twins, learned)
        return {node: found[node] for node in self._needed[number] if node in found}

    def _later(self) -> list[list[fx.Node]]:
        """The values that are still read behind each stretch."""
        needed, found = set(self._out), list[list[fx.Node]]()
        fixed = fixed_nodes(self._program.graph)
        made = [node for node in self._program.graph.nodes if node not in fixed]
        for stretch in reversed(self._stretches):
            found.append([node for node in made if node in needed])
            needed |= {read for node in stretch for read in node.all_input_nodes}
        return found[::-1]


def _peak(work: Callable[[Chunk], object], chunk: Chunk) -> int:
    """The most bytes that work on a chunk takes."""
    with Peak() as peak:
        work(chunk)
    return int(peak.nbytes)


def _cut(value: object) -> object:
    """A value without its past, but with slopes of its own where it had some."""
    return value.detach().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


def _rows(value: object) -> Tensor:
    assert isinstance(value, Tensor)  # a program's outputs are tensors
    return value.flatten(1)
