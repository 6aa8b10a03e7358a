"""What learning blocks will take, from a walk over one chunk of rows on which every kind of block practises."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from dmqfx.graph import ops
from dmqfx.graph.address import Site
from dmqfx.graph.blocks import Block
from dmqfx.graph.program import Program
from dmqfx.graph.table import Codes, Table
from dmqfx.numbers import speeds
from dmqfx.numbers.quant import QParams
from dmqfx.numbers.speeds import finish
from dmqfx.sweep.blockwalk import Arrival, BlockWalk, forward
from dmqfx.sweep.chunks import Chunk
from dmqfx.sweep.estimate import Estimate
from dmqfx.sweep.wayback import remembered

__all__ = ["BlockTrial", "Practice"]

_STEPS = 4
_EACH_WEIGHT = 64
"""Bytes that learning a weight takes beside what a step keeps for its way back: codes and places in double
precision; the learned number, its slope and Adam's two averages; the weight as it is deployed."""


class Practice(Protocol):
    """Learns a block, and forgets it."""

    def __call__(
        self, program: Program, table: Table, block: Block, arrivals: Sequence[Arrival], iterations: int
    ) -> object:
        """Learn for so many iterations."""


@dataclass(frozen=True)
class _Cost:
    """Of one block on one chunk.

    Units: seconds of a step, of a look at the chunk as before and after learning, and of the rest; memory in
    bytes beside what comes in; target in bytes of what the block's output should be.
    """

    step: float
    look: float
    rest: float
    memory: int
    target: int


@dataclass(frozen=True)
class BlockTrial:
    """What a walk over one chunk took, and what the blocks took of it.

    Units: walking in seconds up to each block, and behind the last; kept and working in bytes.
    """

    rows: int
    walking: tuple[float, ...]
    blocks: tuple[_Cost, ...]
    kept: int
    working: int

    @staticmethod
    def of(program: Program, chunk: Chunk, order: Sequence[Block], practice: Practice) -> BlockTrial:
        """Walk up to every block, and learn for some steps where a block is the first of its kind."""
        trial = _Trial(program, practice)
        walk = BlockWalk(program, [chunk], order, memory=2**62)
        walk.run(trial.visit)
        return BlockTrial(
            rows=len(chunk.timestep),
            walking=(*trial.walking, trial.since()),
            blocks=tuple(trial.costs),
            kept=walk.values.peak,
            working=walk.working,
        )

    def seconds(self, rows: int, iterations: int, finished: int = 0) -> list[float]:
        """Until each block is learned, counted from the one before; the last walks on to its output.

        So many of them were finished before: only walked through.
        """
        share, found = rows / self.rows, list[float]()
        for k, (walking, cost) in enumerate(zip(self.walking, self.blocks, strict=False)):
            steps = iterations * cost.step * min(1.0, share)
            learning = steps + cost.look * share + cost.rest if k >= finished else 0.0
            found.append(walking * share + learning)
        return [*found[:-1], found[-1] + self.walking[-1] * share] if found else []

    def estimate(self, rows: int, iterations: int, memory: int, finished: int = 0) -> Estimate:
        """Of learning on so many rows in a memory budget."""
        wanted, room = self.kept * math.ceil(rows / self.rows), self.room(rows, memory)
        beside = memory - room
        return Estimate(
            rows,
            sum(self.seconds(rows, iterations, finished)),
            beside + min(wanted, room),
            max(wanted - room, 0),
        )

    def room(self, rows: int, memory: int) -> int:
        """Bytes of a memory budget that are left for values which wait; 0 if there are none."""
        return max(0, memory - self.beside(rows))

    def beside(self, rows: int) -> int:
        """The most bytes that a block takes, or the values between two."""
        share = rows / self.rows
        learning = (cost.memory + round(cost.target * share) for cost in self.blocks)
        return max([self.working, *learning])


class _Trial:
    """Visits the blocks of a trial; keeps the time."""

    def __init__(self, program: Program, practice: Practice) -> None:
        self._program, self._practice = program, practice
        self._known: dict[object, _Cost] = {}
        self.walking: list[float] = []
        self.costs: list[_Cost] = []
        self._started = speeds.clock()

    def since(self) -> float:
        """Seconds since the last block was over."""
        finish(self._program.device)
        return speeds.clock() - self._started

    def visit(self, table: Table, block: Block, arrivals: Sequence[Arrival]) -> Table:
        """Learn and forget; blocks that are alike cost alike."""
        self.walking.append(self.since())
        (arrival,) = arrivals
        given = {node: pair.real for node, pair in arrival.values.items()}
        values = forward(self._program, block.inside, given, arrival.timestep)
        kind = (_shapes(given), *(_kind(table, node, values[node]) for node in block.inside))
        if kind not in self._known:
            target = sum(leaf.nbytes for leaf in tree_leaves(values[block.out]) if isinstance(leaf, Tensor))
            del values
            self._known[kind] = self._measured(table, block, arrival, target)
        self.costs.append(self._known[kind])
        self._started = speeds.clock()
        return table

    def _measured(self, table: Table, block: Block, arrival: Arrival, target: int) -> _Cost:
        with remembered() as memory:
            self._seconds(table, block, [arrival], 1)  # builds kernels, too
        once = self._seconds(table, block, [arrival], 1)
        more = self._seconds(table, block, [arrival], 1 + _STEPS)
        twice = self._seconds(table, block, [arrival, arrival], 1)
        step, look = max(0.0, more - once) / _STEPS, max(0.0, twice - once)
        learned = (table.get(Site(node.meta["address"], "weight"), Codes) for node in block.inside)
        weights = sum(math.prod(codes.shape) for codes in learned if codes is not None)
        return _Cost(step, look, max(0.0, once - step - look), memory.nbytes + _EACH_WEIGHT * weights, target)

    def _seconds(self, table: Table, block: Block, arrivals: Sequence[Arrival], iterations: int) -> float:
        finish(self._program.device)
        started = speeds.clock()
        self._practice(self._program, table, block, arrivals, iterations)
        finish(self._program.device)
        return speeds.clock() - started


def _kind(table: Table, node: fx.Node, value: object) -> object:
    """What the time of an operation depends on."""
    sites = [Site(node.meta["address"], arg) for arg in ops.args(node)]
    rounded = tuple(site.arg for site in sites if table.get(site, QParams) is not None)
    codes = next((codes.shape for site in sites if (codes := table.get(site, Codes)) is not None), ())
    return str(node.target), _shapes(value), rounded, codes


def _shapes(value: object) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(leaf.shape) for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
