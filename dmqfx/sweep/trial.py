"""One chunk of calibration rows, run once and looked at: how long things take, and how large values are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from dmqfx.graph.modules import computed, constant
from dmqfx.graph.program import Program
from dmqfx.numbers import speeds
from dmqfx.numbers.quant import params_from_range
from dmqfx.numbers.speeds import finish
from dmqfx.sweep.chunks import Chunk
from dmqfx.sweep.deploy import deployed_input
from dmqfx.sweep.finite import finite
from dmqfx.sweep.rows import Batch
from dmqfx.sweep.turn import Reader, Turn, turns

__all__ = ["Sampling", "Trial"]

_BUILDING = 10.0  # seconds that building the kernels of a large model may take


class Sampling(Protocol):
    """What a trial asks of a pass."""

    def problem_rows(self, reader: Reader) -> int:
        """Output positions of a reader's local problem; 0 where there is none."""


@dataclass(frozen=True, eq=False)
class Trial:
    """What a chunk of calibration rows took, by node.

    Units: forward in seconds of the float operation; looking in seconds of what a turn does with the tensor:
    observing, rounding, and sampling rows; nbytes of the value.
    """

    rows: int
    forward: Mapping[fx.Node, float] = field(repr=False)
    looking: Mapping[fx.Node, float] = field(repr=False)
    nbytes: Mapping[fx.Node, int] = field(repr=False)

    @staticmethod
    def of(program: Program, chunk: Chunk, steps: Sequence[Sampling] = (), total: int = 0) -> Trial:
        """Run the float program on one chunk of `total` rows, and on the way look at what a sweep will.

        The first run of a shape also builds its kernels: where that may be most of it, a second one is counted.
        """
        found = Trial._once(program, chunk, steps, total or len(chunk.timestep))
        again = sum(found.forward.values()) < _BUILDING
        return Trial._once(program, chunk, steps, total or len(chunk.timestep)) if again else found

    @staticmethod
    def _once(program: Program, chunk: Chunk, steps: Sequence[Sampling], total: int) -> Trial:
        looking = _Looking(program, chunk, steps, total)
        with torch.no_grad():
            looking.run()
        return Trial(len(chunk.timestep), looking.forward, looking.seconds, looking.nbytes)


class _Looking:
    """Runs a graph as a walk does, letting go of values as soon as it can; notes sizes and seconds."""

    def __init__(self, program: Program, chunk: Chunk, steps: Sequence[Sampling], total: int) -> None:
        self._program, self._turns = program, turns(program)
        self._chunk, self._steps, self._total = chunk, steps, total
        self.forward: dict[fx.Node, float] = {}
        self.seconds: dict[fx.Node, float] = {}
        self.nbytes: dict[fx.Node, int] = {}

    def run(self) -> None:
        """From the inputs to the output."""
        values, device = dict[fx.Node, object](), self._chunk.timestep.device
        last = {read: node for node in self._program.graph.nodes for read in node.all_input_nodes}
        for node in self._program.graph.nodes:
            started = speeds.clock()
            values[node] = self._computed(node, values)
            finish(device)
            self.forward[node] = speeds.clock() - started
            leaves = tree_leaves(values[node])
            self.nbytes[node] = sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))
            self._looked_at(node, values[node])
            for read in node.all_input_nodes:
                if last[read] is node:
                    del values[read]

    def _computed(self, node: fx.Node, values: Mapping[fx.Node, object]) -> object:
        if node.op == "placeholder":
            return self._chunk.inputs[str(node.target)]
        if node.op == "get_attr":
            return constant(self._program.gm, str(node.target))
        return computed(node, values.__getitem__)

    def _looked_at(self, node: fx.Node, value: object) -> None:
        if node not in self._turns or not isinstance(value, Tensor) or not finite(value):
            return  # what is not finite, the walk will name
        started = speeds.clock()
        for axis, readers in self._turns[node]:
            self._look(node, value, axis, readers)
        finish(value.device)
        self.seconds[node] = speeds.clock() - started

    def _look(self, node: fx.Node, x: Tensor, axis: int, readers: tuple[Reader, ...]) -> None:
        batch = Batch(x, x.view_as(x), self._chunk.timestep, self._chunk.first)
        turn = Turn(self._program, self._program.table, node, axis, readers, _One(batch, self._total))
        for reader in readers:
            if reader.spec is not None:
                seen = turn.range(reader.spec.boundaries)
                params = params_from_range(seen.low, seen.high, reader.spec, axis)
                deployed_input(x, params, None, None, self._chunk.timestep, axis)
            for count in {step.problem_rows(reader) for step in self._steps} - {0}:
                turn.rows(reader, count)


@dataclass(frozen=True, eq=False)
class _One:
    """A turn's tensor on the trial's chunk alone, whose float and quantized value are looked at as if they differed."""

    batch: Batch
    total: int

    def __iter__(self) -> Iterator[Batch]:
        yield self.batch

    @property
    def working(self) -> int:
        """None: nothing is set apart in a trial."""
        return 0

    def gather(self, x: Tensor) -> Tensor:
        """The trial is every process's own."""
        return x

    def reserve(self, nbytes: int, what: str) -> None:
        """There is room: a trial's rows are few."""
