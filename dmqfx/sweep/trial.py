"""One chunk of calibration rows, run once and looked at: how long things take, and how large values are."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from dmqfx.graph.program import Program
from dmqfx.numbers.observers import Observer
from dmqfx.numbers.quant import params_from_range
from dmqfx.sweep.chunks import Chunk
from dmqfx.sweep.deploy import deployed_input
from dmqfx.sweep.finite import finite
from dmqfx.sweep.turn import Reader, turns

__all__ = ["Trial", "clock", "multiply_adds_per_second"]

clock = time.perf_counter


@dataclass(frozen=True, eq=False)
class Trial:
    """What a chunk of calibration rows took.

    Units: seconds of a float forward pass, and of observing and rounding what is planned; nbytes by node.
    """

    rows: int
    forward: float
    rounding: float
    nbytes: Mapping[fx.Node, int] = field(repr=False)

    @staticmethod
    def of(program: Program, chunk: Chunk) -> Trial:
        """Run the float program on a chunk, and on the way observe and round what a sweep will."""
        looking = _Looking(program, chunk.timestep)
        inputs = [n for n in program.graph.nodes if n.op == "placeholder"]
        started = clock()
        with torch.no_grad():
            looking.run(*(chunk.inputs[str(node.target)] for node in inputs))
        _finish(program.device)
        forward = clock() - started - looking.seconds
        return Trial(len(chunk.timestep), forward, looking.seconds, looking.nbytes)


class _Looking(fx.Interpreter):
    """Runs a graph, letting go of values as soon as it can; notes sizes, and the seconds that rounding takes."""

    def __init__(self, program: Program, timestep: Tensor) -> None:
        super().__init__(program.gm)
        self._turns, self._timestep = turns(program), timestep
        self.nbytes: dict[fx.Node, int] = {}
        self.seconds = 0.0

    def run_node(self, n: fx.Node) -> object:
        value = super().run_node(n)
        self.nbytes[n] = sum(leaf.nbytes for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
        if (
            n in self._turns and isinstance(value, Tensor) and finite(value)
        ):  # what is not, the walk will name
            _finish(value.device)
            started = clock()
            for axis, readers in self._turns[n]:
                for reader in readers:
                    _round(value, reader, axis, self._timestep)
            _finish(value.device)
            self.seconds += clock() - started
        return value


def _round(x: Tensor, reader: Reader, axis: int, timestep: Tensor) -> None:
    if reader.spec is None:
        return
    observer = Observer(str(reader.site), axis)
    observer(x)
    seen = observer.result()
    groups = len(reader.spec.boundaries) + 1
    low, high = (value.expand(groups, -1) for value in (seen.low, seen.high))
    deployed_input(x, params_from_range(low, high, reader.spec, axis), None, None, timestep, axis)


def multiply_adds_per_second(device: torch.device, size: int = 512) -> float:
    """How fast the machine multiplies double-precision matrices, as most of a local problem does."""
    a = torch.ones(size, size, dtype=torch.float64, device=device)
    seconds = []
    for _ in range(4):
        started = clock()
        torch.mm(a, a)
        _finish(device)
        seconds.append(clock() - started)
    return float(size**3 / min(seconds))


def _finish(device: torch.device) -> None:
    """Wait for what was begun."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
