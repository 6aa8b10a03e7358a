"""Samples that learn-steps does not learn from: whole ones, and they decide how far it goes."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from planting import context, program_before
from sweeping import bits, output
from toys import rows

from dmqfx.calibration.calibration import Calibration
from dmqfx.calibration.rows import Column, Rows
from dmqfx.graph.pipeline import PassContext, run_step
from dmqfx.graph.program import Program
from dmqfx.graph.registry import create
from dmqfx.runtime.operators import timestep_group
from dmqfx.sweep.chunks import held_out, mixed
from dmqfx.sweep.endtoend import Objective, Steps
from dmqfx.sweep.network import Network

QUICK = {"rows": 12, "batch": 4, "iterations": 30, "groups": 4}


def recorded(samples: list[tuple[int, int]]) -> tuple[Calibration, torch.Tensor]:
    """Calls of samples (height, halves) over three steps, steps outermost as a sampler has them; each row's sample."""
    groups, of, trajectory = list[Rows](), list[int](), 0
    for height in sorted({each[0] for each in samples}):
        own = [(k, halves) for k, (size, halves) in enumerate(samples) if size == height]
        places = [(k, trajectory + n) for n, k in enumerate(k for k, halves in own for _ in range(halves))]
        trajectory += len(places)
        latents, index, which, steps = list[torch.Tensor](), list[int](), list[int](), list[int]()
        for step in range(3):
            known = dict[int, int]()
            for k, place in places:
                if k not in known:
                    known[k] = 0 if step == 0 else len(latents)  # all begin with the same noise
                    if step or not latents:
                        latents.append(torch.full((1, height, 2), float(len(latents))))
                index.append(known[k])
                which.append(place)
                steps.append(step)
                of.append(k)
        numbers = torch.tensor(index)
        columns = {
            "sample": Column(torch.stack(latents), numbers),
            "timestep": Column(torch.tensor([9.0, 5.0, 1.0]), torch.tensor(steps)),
        }
        groups.append(Rows(columns, torch.tensor(which), torch.tensor(steps)))
    return Calibration(tuple(groups)), torch.tensor(of)


SAMPLES = st.lists(st.tuples(st.sampled_from([2, 4]), st.sampled_from([1, 2])), min_size=1, max_size=40)


@given(SAMPLES, st.integers(2, 16), st.integers(0, 9))
def test_whole_samples_are_held_out_and_the_halves_of_a_pair_together(
    samples: list[tuple[int, int]], parts: int, seed: int
) -> None:
    data, of = recorded(samples)
    learning, judging = held_out(data, parts, torch.Generator().manual_seed(seed))
    assert sorted([*learning.tolist(), *judging.tolist()]) == list(range(len(data)))
    learned, judges = set(of[learning].tolist()), set(of[judging].tolist())
    assert not learned & judges
    assert len(judges) == (0 if len(samples) < 3 else max(1, len(samples) // parts))


def test_rows_are_taken_from_those_that_are_said() -> None:
    data, among = rows(), torch.tensor([1, 2, 5, 7, 11])
    program = program_before("learn-steps", "shifts")
    chunks = mixed(data, program, 4, 2, torch.Generator().manual_seed(0), among)
    numbers = [number for chunk in chunks for number in chunk.numbers]
    assert len(set(numbers)) == 4
    assert set(numbers) < set(among.tolist())
    (group,) = data.groups
    for chunk in chunks:
        wanted = group.columns["sample"].rows(torch.tensor(chunk.numbers))
        assert torch.equal(chunk.inputs["sample"], wanted)


def sampled() -> Calibration:
    """The toy's rows as those of four samples."""
    (group,) = rows().groups
    return Calibration((replace(group, trajectory=torch.arange(12) % 4, step=torch.arange(12) // 4),))


def learned(data: Calibration, **options: object) -> Program:
    ctx: PassContext = replace(context("shifts"), calibration=data)
    return run_step(create("learn-steps", {**QUICK, **options}), program_before("learn-steps", "shifts"), ctx)


def left(data: Calibration, program: Program, numbers: torch.Tensor) -> float:
    """What is left of each group's error on some rows, counted on lowered graphs."""
    (group,) = data.groups
    batch = next(Calibration((group.take(numbers),)).batches(12, program.inputs, dtype=program.dtype))
    edges, errors = torch.tensor([250.0, 500.0, 750.0]), list[torch.Tensor]()
    before = program_before("learn-steps", "shifts")
    for each in (before, program):
        lowered = each
        for name in ("insert-qdq", "lower-simulate"):
            lowered = run_step(create(name), lowered, context("shifts"))
        with torch.no_grad():
            off = (
                (output(before.gm(**batch)) - output(lowered.gm(**batch)))
                .double()
                .square()
                .flatten(1)
                .mean(1)
            )
        group_of = timestep_group(batch["timestep"], edges)
        errors.append(torch.zeros(4, dtype=torch.float64).index_add_(0, group_of, off))
    live = errors[0] > 0
    return float((errors[1] / errors[0])[live].mean())


def test_what_is_told_is_what_rows_lack_that_were_not_learned_from() -> None:
    data = sampled()
    program = learned(data)
    told = program.log[-1].applied[0].what
    assert told.endswith("of the error at the output is left on rows that it did not learn from")
    _, judging = held_out(data, 16, context("shifts").generator())
    assert len(judging) == 3
    assert left(data, program, judging) == pytest.approx(float(told.split()[0]), rel=0.02)


def test_where_nothing_can_be_held_out_a_warning_says_so(caplog: pytest.LogCaptureFixture) -> None:
    program = learned(rows(), iterations=2)
    assert "did not learn from" not in program.log[-1].applied[0].what
    (warned,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "learn-steps learns from 12 calibration rows of one or two samples" in warned.getMessage()
    assert "mend: record more prompts" in warned.getMessage()


def test_what_judges_do_not_gain_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if whatever was learned did the judges harm; the rows that were learned from gain."""
    honest = Objective.left

    def harmed(objective: Objective, steps: Steps) -> float:
        judged = sum(len(chunk.timestep) for chunk in objective.chunks)
        found = honest(objective, steps)
        return 2 - found if judged == 3 else found

    monkeypatch.setattr(Objective, "left", harmed)
    program, before = learned(sampled()), program_before("learn-steps", "shifts")
    record = program.log[-1]
    assert record.applied == ()
    assert "on rows that it did not learn from; what was there is kept" in record.refused[0].reason
    assert bits(program.table) == bits(before.table)


@pytest.mark.parametrize(("best", "share"), [(1.0, 1.0), (0.6, 1.0), (0.3, 0.5), (0.2, 0.25), (0.0, 0.125)])
def test_it_goes_back_where_no_less_is_left_than_there_was(best: float, share: float) -> None:
    """What is left is least at a share of the way, and 1 at its beginning."""
    program = program_before("learn-steps", "shifts")
    steps = Steps(program, program.table, Network(program).nodes)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for each in steps.numbers:
            each.copy_(torch.randn(each.shape, generator=generator))
    was = [each.detach().clone() for each in steps.numbers]

    def left(steps: Steps) -> float:
        gone = float(steps.numbers[0].detach().flatten()[0] / was[0].flatten()[0])
        return 1 + (gone - best) ** 2 - best**2

    found = Objective.settle(SimpleNamespace(left=left), steps)  # type: ignore[arg-type]  # all that it asks for
    assert found == pytest.approx(1 + (share - best) ** 2 - best**2)
    assert all(torch.equal(now, before * share) for now, before in zip(steps.numbers, was, strict=True))
