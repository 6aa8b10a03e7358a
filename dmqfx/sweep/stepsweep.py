"""Learning steps from beginning to end: what it will take is said, then the iterations, kept in a run directory."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, NoReturn, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from dmqfx import processes
from dmqfx.calibration.calibration import Calibration
from dmqfx.errors import CalibrationError, StoreError
from dmqfx.graph.address import Site
from dmqfx.graph.pipeline import PassContext
from dmqfx.graph.program import Program
from dmqfx.graph.table import Entry, Table
from dmqfx.numbers import speeds
from dmqfx.numbers.speeds import second_time
from dmqfx.sweep.budget import scaled
from dmqfx.sweep.chunks import Chunk, held_out, mixed
from dmqfx.sweep.endtoend import Descent, Objective, Steps
from dmqfx.sweep.estimate import Estimate, tell
from dmqfx.sweep.finite import refuse_broken_weights
from dmqfx.sweep.key import of_table
from dmqfx.sweep.network import Network, Room
from dmqfx.sweep.plan import Learner, calibration_for, settled, tell_plan, warn_of_memory
from dmqfx.sweep.run import NoRun
from dmqfx.sweep.visits import kept

__all__ = ["Found", "learn_steps"]

_log = logging.getLogger(__name__)
_OFTEN: Final = 20.0
"""Seconds of learning that a killed process may lose, and an iteration."""
_ONE_IN: Final = 16
"""Of so many samples one is not learned from, and judges."""
_BETAS: Final = (0.9, 0.99)
_PORTION: Final = "portion"
"""In what is kept: rows that slopes are taken of at a time, on which their last digits depend."""


class StepLearner(Learner, Protocol):
    """A pass that learns steps; `groups` of timesteps count alike, `rate` and `warmup` are those of Descent."""

    @property
    def groups(self) -> int: ...

    @property
    def rate(self) -> float: ...

    @property
    def warmup(self) -> float: ...


@dataclass(frozen=True, eq=False)
class Found:
    """What learning came to: entries, and the share of the error that is left, the mean over timestep groups.

    `unseen` says whether that is counted on rows that it did not learn from.
    """

    entries: dict[Site, Entry]
    left: float
    unseen: bool


def learn_steps(program: Program, step: StepLearner, ctx: PassContext) -> Found:
    """Learn.

    Where there are several processes each has a share of every batch, and slopes are summed.

    Raises: CalibrationError without calibration data, for data that do not fit, for values or a loss that are
        not finite; StoreError for a run directory or a disk.
    """
    refuse_broken_weights(program)
    data = calibration_for(program, [(step, ctx)])
    assert data is not None  # a learner needs some
    with kept(program, data, [(step, ctx)]) as run:
        known = run.state() if processes.is_first() else None
        portion = int(processes.agreed(0 if known is None else int(known[1][_PORTION])))
        plan = _planned(program, step, ctx, data, run.factor, portion)
        run.begin(plan.factor)
        edges = torch.tensor([ctx.train_timesteps * k / step.groups for k in range(1, step.groups)])
        network = Network(program, sparing=plan.room.sparing)
        steps, started = Steps(program, program.table, network.nodes), speeds.clock()
        objective = Objective(network, plan.chunks, edges)
        judge = Objective(network, plan.judged, edges) if plan.judged else objective
        with tqdm(total=plan.step.iterations, desc=step.name(), disable=not ctx.progress) as bar:
            for each in dict.fromkeys((objective, judge)):  # in one order in all processes, which sum up
                each.begin(steps)
            _descend(objective, steps, plan, run, ctx, bar)
        steps.spread()
        left = judge.settle(steps)
        processes.same("steps", of_table(Table().put_all(steps.entries())))
        tell(step.name(), speeds.clock() - started, plan.seconds)
    return Found(steps.entries(), left, bool(plan.judged))


def _descend(
    objective: Objective, steps: Steps, plan: _Plan, run: NoRun, ctx: PassContext, bar: tqdm[NoReturn]
) -> None:
    """All iterations that a run directory does not know yet."""
    how = Descent(plan.step.iterations, plan.step.rate, plan.step.warmup)
    adam = torch.optim.Adam(steps.groups(how.rate), betas=_BETAS, foreach=False)
    rates = [group["lr"] for group in adam.param_groups]
    begun = _resumed(run, steps, adam)
    bar.update(begun)
    saved = speeds.clock()
    for iteration, k in enumerate(_order(len(plan.chunks), how.iterations, ctx.seed)):
        if iteration < begun:
            continue
        for group, rate in zip(adam.param_groups, rates, strict=True):
            group["lr"] = rate * how.factor(iteration)
        loss = _slopes(objective, steps, k, plan)
        adam.step()
        steps.bound()
        bar.set_postfix_str(f"loss {loss:.3g}", refresh=False)
        bar.update()
        last = iteration + 1 == how.iterations
        if last or speeds.clock() - saved > _OFTEN:
            run.keep(iteration + 1, {**_state(steps, adam), _PORTION: torch.tensor(plan.room.rows)})
            saved = speeds.clock()


def _slopes(objective: Objective, steps: Steps, k: int, plan: _Plan) -> float:
    """Each number's slope for one batch, in parts that fit the memory; the batch's loss."""
    rows, total = len(objective.chunks[k].timestep), torch.zeros((), dtype=torch.float64)
    for each in steps.numbers:
        each.grad = None
    for start in range(0, rows, plan.room.rows):
        with torch.enable_grad():
            loss = objective.loss(k, slice(start, start + plan.room.rows), steps, steps.learned())
            (loss / plan.whole[k]).backward()  # type: ignore[no-untyped-call]  # torch has no types for it
        total += loss.detach().double().cpu() / plan.whole[k]
    total = processes.summed(total)
    if not bool(torch.isfinite(total)):
        raise CalibrationError(
            f"{plan.step.name()} has come to a loss that is not finite\n  mend: a smaller rate than {plan.step.rate:g}"
        )
    for each in steps.numbers:
        each.grad = processes.summed(torch.zeros_like(each) if each.grad is None else each.grad)
    return float(total)


def _order(chunks: int, iterations: int, seed: int) -> Iterator[int]:
    """Which batch each iteration looks at: all in random order, then all in another one."""
    generator, left = torch.Generator().manual_seed(seed), list[int]()
    for _ in range(iterations):
        left = left or torch.randperm(chunks, generator=generator).tolist()
        yield left.pop()


def _state(steps: Steps, adam: torch.optim.Adam) -> dict[str, Tensor]:
    """All that later iterations depend on."""
    found = {}
    for k, each in enumerate(steps.numbers):
        found[f"{k}"] = each.detach()
        found |= {f"{k}.{name}": value for name, value in adam.state[each].items()}
    return found


def _resumed(run: NoRun, steps: Steps, adam: torch.optim.Adam) -> int:
    """How many iterations were made before; what they came to is taken.

    Raises: StoreError if this process does not see what the first one kept.
    """
    known = run.state() if processes.is_first() else None
    begun = int(processes.agreed(known[0] if known is not None else 0))
    if not begun:
        return 0
    known = known or run.state()  # the first process has it, and writes no other before all go on
    if known is None:
        raise StoreError(
            "the run directory is not seen by all processes\n  mend: a run directory on a disk that they share"
        )
    _log.info("%d iterations were made before", begun)
    for k, each in enumerate(steps.numbers):
        with torch.no_grad():
            each.copy_(known[1][f"{k}"])
        names = ("step", "exp_avg", "exp_avg_sq")
        adam.state[each] = {name: known[1][f"{k}.{name}"] for name in names}
    return begun


@dataclass(frozen=True, eq=False)
class _Plan:
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


def _planned(
    program: Program,
    step: StepLearner,
    ctx: PassContext,
    data: Calibration,
    factor: float | None,
    portion: int,
) -> _Plan:
    """The plan, said in one line; `factor`, and `portion` if not 0, are those that a run had already settled."""
    learning, judging = held_out(data, _ONE_IN, ctx.generator())
    largest = max(
        mixed(data, program, step.rows, step.batch, ctx.generator()),
        key=lambda chunk: chunk.inputs["sample"].numel(),
    )
    trial = _Trial.of(program, largest, step.batch, ctx.memory)

    def counts(changed: StepLearner) -> tuple[int, int]:
        return min(changed.rows, len(learning)), min(
            max(changed.batch, changed.rows // _ONE_IN), len(judging)
        )

    def seconds(factor: float) -> float:
        changed = scaled(step, factor)
        return trial.seconds(*counts(changed), changed.iterations)

    factor = processes.agreed(settled(factor, ctx, seconds))
    changed = scaled(step, factor)
    rows = counts(changed)
    estimate = Estimate(sum(rows), seconds(factor), trial.room.nbytes)
    tell_plan(step.name(), estimate, [(step, ctx)], factor)
    warn_of_memory(trial.room.nbytes, step, ctx)
    if not rows[1]:
        _log.warning(
            "%s learns from %d calibration rows of one or two samples, and none is left to judge it by: other calls may "
            "get worse\n  mend: record more prompts, or no %s in the policy", step.name(), rows[0], step.name(),
        )  # fmt: skip
    whole, judged = (
        mixed(data, program, count, step.batch, ctx.generator(), among) if count else []
        for count, among in zip(rows, (learning, judging), strict=True)
    )
    parts = slice(processes.rank(), None, processes.count())
    own, judges = ([chunk.part(parts) for chunk in chunks] for chunks in (whole, judged))
    room, sizes = (
        replace(trial.room, rows=portion or trial.room.rows),
        [len(chunk.timestep) for chunk in whole],
    )
    return _Plan(changed, own, judges, sizes, room, factor, estimate.seconds)


@dataclass(frozen=True)
class _Trial:
    """What a batch costs.

    Units: look and iterate in seconds for one row, of the float network, of the quantized one, and of a step of
    learning.
    """

    real: float
    quantized: float
    iterate: float
    batch: int
    room: Room

    @staticmethod
    def of(program: Program, chunk: Chunk, batch: int, memory: int) -> _Trial:
        """Try the parts of a batch that fit the memory."""
        network = Network(program)
        steps = Steps(program, program.table, network.nodes)
        room = network.room(chunk, memory, steps.twins, steps.learned())
        network.sparing = room.sparing
        some = chunk.part(slice(room.rows))
        objective = Objective(network, [some], torch.empty(0))
        with torch.no_grad():
            real = second_time(program.device, partial(network, some))
            quantized = second_time(program.device, partial(network, some, steps.twins, steps.learned()))
        objective.begin(steps)

        def step() -> None:
            with torch.enable_grad():
                objective.loss(0, slice(None), steps, steps.learned()).backward()  # type: ignore[no-untyped-call]  # torch has no types for it

        rows = len(some.timestep)
        iterate = second_time(program.device, step)
        return _Trial(real / rows, quantized / rows, iterate / rows, batch, room)

    def seconds(self, rows: int, judged: int, iterations: int) -> float:
        """Of learning: looks of the float network and of the quantized one, and the iterations."""
        looks = (1, 4) if judged else (2, 0)  # of the quantized network, at either kind of rows
        seen = (rows + judged) * self.real + (rows * looks[0] + judged * looks[1]) * self.quantized
        return (seen + iterations * min(self.batch, rows) * self.iterate) / processes.count()
