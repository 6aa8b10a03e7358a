"""Learning steps from beginning to end: what it will take is said, then the iterations, kept in a run directory."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NoReturn

import torch
from torch import Tensor
from tqdm import tqdm

from dmqfx import processes
from dmqfx.errors import CalibrationError, StoreError
from dmqfx.graph.address import Site
from dmqfx.graph.pipeline import PassContext
from dmqfx.graph.program import Program
from dmqfx.graph.table import Entry, Table
from dmqfx.numbers import speeds
from dmqfx.sweep.endtoend import Descent, Objective, Steps
from dmqfx.sweep.estimate import tell
from dmqfx.sweep.finite import refuse_broken_weights
from dmqfx.sweep.key import of_table
from dmqfx.sweep.network import Network
from dmqfx.sweep.plan import calibration_for
from dmqfx.sweep.run import NoRun
from dmqfx.sweep.stepplan import StepLearner, StepPlan, planned
from dmqfx.sweep.visits import kept

__all__ = ["Found", "learn_steps"]

_log = logging.getLogger(__name__)
_OFTEN: Final = 20.0
"""Seconds of learning that a killed process may lose, and an iteration."""
_BETAS: Final = (0.9, 0.99)
_PORTION: Final = "portion"
"""In what is kept: rows that slopes are taken of at a time, on which their last digits depend."""


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
        plan = planned(program, step, ctx, data, run.factor, portion)
        run.begin(plan.factor)
        edges = torch.tensor([ctx.train_timesteps * k / step.groups for k in range(1, step.groups)])
        network = Network(program, sparing=plan.room.sparing)
        steps, started = Steps(program, program.table, network.nodes), speeds.clock()
        objective = Objective(network, plan.chunks, edges, plan.room.rows)
        judge = Objective(network, plan.judged, edges, plan.room.rows) if plan.judged else objective
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
    objective: Objective, steps: Steps, plan: StepPlan, run: NoRun, ctx: PassContext, bar: tqdm[NoReturn]
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


def _slopes(objective: Objective, steps: Steps, k: int, plan: StepPlan) -> float:
    """Each number's slope for one batch, in parts that fit the memory; the batch's loss."""
    total = torch.zeros((), dtype=torch.float64)
    for each in steps.numbers:
        each.grad = None
    for rows in objective.portions(k):
        with torch.enable_grad():
            loss = objective.loss(k, rows, steps, steps.learned())
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
