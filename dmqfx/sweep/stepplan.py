"""The plan of learning steps: which rows are learned from and which judge, in what portions, and how long that takes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, Protocol

import torch
from torch import Tensor

from dmqfx import processes
from dmqfx.calibration.calibration import Calibration
from dmqfx.graph.pipeline import PassContext
from dmqfx.graph.program import Program
from dmqfx.numbers.speeds import row_time
from dmqfx.sweep.budget import scaled
from dmqfx.sweep.chunks import Chunk, held_out, mixed
from dmqfx.sweep.endtoend import Steps, practise
from dmqfx.sweep.estimate import Estimate
from dmqfx.sweep.network import Network, Room
from dmqfx.sweep.plan import Learner, settled, tell_plan, warn_of_memory

__all__ = ["StepLearner", "StepPlan", "planned"]

_log = logging.getLogger(__name__)
_ONE_IN: Final = 16
"""Of so many samples one is not learned from, and judges."""


class StepLearner(Learner, Protocol):
    """A pass that learns steps; `groups` of timesteps count alike, `rate` and `warmup` are those of Descent."""

    @property
    def groups(self) -> int: ...

    @property
    def rate(self) -> float: ...

    @property
    def warmup(self) -> float: ...


@dataclass(frozen=True, eq=False)
class StepPlan:
    """The pass and its rows as a time budget and the memory want them.

    Units: `chunks` are this process's share of every batch, `whole` the rows of all of it, `judged` its share of what
    judges; seconds of all.
    """

    step: StepLearner
    chunks: Sequence[Chunk]
    judged: Sequence[Chunk]
    whole: Sequence[int]
    room: Room
    factor: float
    seconds: float


def planned(
    program: Program,
    step: StepLearner,
    ctx: PassContext,
    data: Calibration,
    factor: float | None,
    portion: int,
) -> StepPlan:
    """The plan, said in one line; `factor`, and `portion` if not 0, are those that a run had already settled."""
    learning, judging = held_out(data, _ONE_IN, ctx.generator())
    largest = max(
        mixed(data, program, step.rows, step.batch, ctx.generator()),
        key=lambda chunk: chunk.inputs["sample"].numel(),
    )
    trial = _Trial.of(program, largest, step.batch, ctx.memory)

    def seconds(factor: float) -> float:
        changed = scaled(step, factor)
        return trial.seconds(*_counts(changed, learning, judging), changed.iterations)

    factor = processes.agreed(settled(factor, ctx, seconds))
    changed = scaled(step, factor)
    rows = _counts(changed, learning, judging)
    tell_plan(step.name(), Estimate(sum(rows), seconds(factor), trial.room.nbytes), [(step, ctx)], factor)
    warn_of_memory(trial.room.nbytes, step, ctx)
    if not rows[1]:
        _warn_of_few(step, rows[0])
    whole, judged = (
        mixed(data, program, count, step.batch, ctx.generator(), among) if count else []
        for count, among in zip(rows, (learning, judging), strict=True)
    )
    parts = slice(processes.rank(), None, processes.count())
    own, judges = ([chunk.part(parts) for chunk in chunks] for chunks in (whole, judged))
    room = replace(trial.room, rows=portion or trial.room.rows)
    return StepPlan(changed, own, judges, [len(c.timestep) for c in whole], room, factor, seconds(factor))


def _counts(step: StepLearner, learning: Tensor, judging: Tensor) -> tuple[int, int]:
    """How many rows are learned from, and how many judge: of the samples that are held out no more than their share."""
    return min(step.rows, len(learning)), min(max(step.batch, step.rows // _ONE_IN), len(judging))


def _warn_of_few(step: StepLearner, rows: int) -> None:
    _log.warning(
        "%s learns from %d calibration rows of one or two samples, and none is left to judge it by: other calls may get "
        "worse\n  mend: record more prompts, or no %s in the policy", step.name(), rows, step.name(),
    )  # fmt: skip


@dataclass(frozen=True)
class _Trial:
    """What a batch costs.

    Units: seconds of one row, `real` of a look of the float network, `quantized` of one of the quantized network,
    `iterate` of a step of learning.
    """

    real: float
    quantized: float
    iterate: float
    batch: int
    room: Room

    @staticmethod
    def of(program: Program, chunk: Chunk, batch: int, memory: int) -> _Trial:
        """Try the parts of a batch that fit the memory; where they take long, two rows stand for all, with their share of
        what a step does once, however many there are: too much is told then rather than too little.
        """
        network = Network(program)
        steps = Steps(program, program.table, network.nodes)
        step = partial(practise, network, steps)
        room = network.room(chunk, memory, steps.twins, steps.learned())
        room = network.tried(room, chunk, memory, step)
        learned = steps.twins, steps.learned()

        def row(work: Callable[[Chunk], object]) -> float:
            return row_time(program.device, lambda count: work(chunk.part(slice(count))), room.rows)

        with torch.no_grad():
            real, quantized = row(network), row(lambda some: network(some, *learned))
        return _Trial(real, quantized, max(0.0, row(step) - real), batch, room)

    def seconds(self, rows: int, judged: int, iterations: int) -> float:
        """Of learning: looks of the float network and of the quantized one, and the iterations."""
        looks = (1, 4) if judged else (2, 0)  # of the quantized network, at either kind of rows
        seen = (rows + judged) * self.real + (rows * looks[0] + judged * looks[1]) * self.quantized
        return (seen + iterations * min(self.batch, rows) * self.iterate) / processes.count()
