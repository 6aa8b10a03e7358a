"""What a sweep is said to take: measured on this machine, put together by size, and held against what it took."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import one_level
from sweeping import chain, context, planned, recorded, swept

from dmqfx import emoji
from dmqfx.cli import main
from dmqfx.compiler import compile as compile_unet
from dmqfx.graph.pipeline import run_step
from dmqfx.graph.registry import create, pipeline
from dmqfx.numbers import effort, speeds
from dmqfx.numbers.gptq import handed_on
from dmqfx.numbers.quant import QuantSpec
from dmqfx.numbers.rounding import Reconstruction
from dmqfx.numbers.speeds import Speeds
from dmqfx.sweep.budget import Budget
from dmqfx.sweep.chunks import chunked
from dmqfx.sweep.estimate import Costs, duration
from dmqfx.sweep.schedule import Schedule
from dmqfx.sweep.streaming import streamed
from dmqfx.sweep.trial import Trial

CPU = torch.device("cpu")


class Clock:
    """A clock that stands still unless it is told."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(speeds, "clock", made)
    return made


def working(clock: Clock, seconds: Callable[[int], float], made: list[int]) -> speeds.Prepare:
    """An operation that takes so many seconds by its size, and notes the sizes that it was made for."""

    def prepare(size: int, device: torch.device) -> Callable[[], object]:
        made.append(size)

        def run() -> None:
            clock.now += seconds(size)

        return run

    return prepare


@pytest.mark.parametrize(
    ("size", "expected"), [(5, 10.0), (10, 10.0), (20, 20.0), (50, 50.0), (100, 100.0), (200, 800.0)]
)
def test_time_is_a_power_of_the_size_between_what_was_measured_and_beyond(
    clock: Clock, size: int, expected: float
) -> None:
    prepare = working(clock, float, [])
    assert Speeds(CPU).seconds(prepare, size, at=(10, 100), exponent=3) == pytest.approx(expected)


def test_an_operation_is_timed_once_for_a_size_and_only_at_the_sizes_that_are_needed(clock: Clock) -> None:
    made: list[int] = []
    prepare, own = working(clock, float, made), Speeds(CPU)
    for size in (300, 200, 250):
        own.seconds(prepare, size, at=(10, 100), exponent=1)
    assert made == [100]
    own.seconds(prepare, 50, at=(10, 100), exponent=1)
    assert made == [100, 10]


def test_the_best_of_some_short_times_counts_and_a_long_one_is_not_repeated(clock: Clock) -> None:
    times = iter([0.003, 0.002, 0.004, 5.0])
    own, prepare = Speeds(CPU), working(clock, lambda size: next(times), [])
    assert own.seconds(prepare, 1, at=(1,), exponent=1) == pytest.approx(0.002)
    assert own.seconds(prepare, 2, at=(2,), exponent=1) == 5.0


@pytest.mark.parametrize(
    ("seconds", "looks", "expected"), [(0.25, [2, 2, 8, 8], 0.25), (0.7, [2, 2, 8], 0.7), (30.0, [2], 30.0)]
)
def test_two_rows_stand_for_all_where_they_take_long(
    clock: Clock, seconds: float, looks: list[int], expected: float
) -> None:
    """What takes long is not done again for kernels that the first time builds."""
    seen: list[int] = []

    def work(rows: int) -> None:
        seen.append(rows)
        clock.now += seconds * rows

    assert speeds.row_time(CPU, work, 8) == pytest.approx(expected)
    assert seen == looks


@pytest.mark.parametrize(("columns", "out"), [(576, 64), (256, 512)])
def test_a_local_problem_takes_about_what_is_estimated(
    columns: int, out: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a factor of 3, in processor time: a test machine does other things too."""
    monkeypatch.setattr(speeds, "clock", time.process_time)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows, noise = 4096, torch.Generator().manual_seed(0)
        expected = effort.reconstruction(Speeds(CPU), rows, columns, out, metric=True)
        x, w = torch.randn(rows, columns, generator=noise), torch.randn(out, columns, generator=noise)
        started = time.process_time()
        problem = Reconstruction(
            given=x,
            wanted=x.double() @ w.double().T,
            weight=w,
            spec=QuantSpec(4, "symmetric", "channel", range="mse"),
            metric=torch.eye(out),
        )
        handed_on(problem)
        took = time.process_time() - started
    finally:
        torch.set_num_threads(threads)
    assert expected / 3 < took < expected * 3


def costs(rows: int) -> tuple[Costs, Trial]:
    program = chain()
    chunk = next(chunked(recorded(program, rows), program, rows))
    tried = Trial.of(program, chunk)
    flat = replace(
        tried,
        forward=dict.fromkeys(tried.forward, 1.0),
        looking=dict.fromkeys(tried.looking, 100.0),
    )
    return Costs(program, Schedule(program), flat, Speeds(CPU)), flat


def test_the_walk_costs_two_forward_passes_where_a_plan_changes_values_and_one_before() -> None:
    """Up to the last turn: what lies behind it is not computed."""
    found, tried = costs(4)
    differing = found.schedule.differing
    walked = {node for segment in found.schedule.segments if segment.source for node in segment.nodes}
    assert any(segment.nodes for segment in found.schedule.segments if not segment.source)
    assert 0 < len(differing & walked) < len(walked)
    expected = len(walked) + len(differing & walked) + 100 * len(tried.looking)
    assert sum(found.turns((), 4)) == pytest.approx(expected)
    assert sum(found.turns((), 12)) == pytest.approx(3 * expected)
    assert len(found.turns((), 4)) == len(found.schedule.sites)


def test_every_pass_counts_for_what_it_does() -> None:
    found, _ = costs(4)
    alone = sum(found.turns((), 4))

    def added(name: str, **options: object) -> float:
        steps = pipeline([(name, options)]).steps
        return sum(found.turns(steps, 4)) - alone  # type: ignore[arg-type]  # all of them are sweep passes

    gptq = added("round-weights", method="gptq", rows=2**18)
    assert gptq > 1.2 * added("round-weights", method="gptq", rows=64) > 0
    assert gptq > added("round-weights", method="nearest") > 0
    assert added("fit-ranges") == 0  # the plan asks for extremes, which are part of the look
    assert added("vote-shifts") == 0  # no long skip
    assert added("vote-shifts", where="all") > 0


def test_a_corrected_bias_costs_both_calls_of_the_layer_and_looks_at_what_they_give() -> None:
    found, _ = costs(4)
    steps = pipeline([("correct-bias", {})]).steps
    readers, alone = found.schedule.readers, sum(found.turns((), 4))
    calls = 2 * len(readers)  # of a second each in this trial, for as many rows
    for rows in (4, 12):
        added = sum(found.turns(steps, rows)) - alone * rows / 4  # type: ignore[arg-type]  # a sweep pass
        assert calls * rows / 4 < added < (calls + 1) * rows / 4
    looked = [steps[0].cost(found.program, reader, 1e7, found.speeds) for reader in readers]  # type: ignore[attr-defined]
    assert min(looked) > 0
    floating = [replace(reader, weight_spec=None) for reader in readers]
    assert not any(steps[0].calls(reader) for reader in floating)  # type: ignore[attr-defined]
    assert not any(steps[0].cost(found.program, reader, 1e7, found.speeds) for reader in floating)  # type: ignore[attr-defined]


def test_votes_are_counted_at_long_skips() -> None:
    program = planned("unconditional")
    schedule = Schedule(program)
    step = pipeline([("vote-shifts", {})]).steps[0]
    own = Speeds(CPU)
    fed = [reader for reader in schedule.readers if step.cost(program, reader, 1e6, own) > 0]  # type: ignore[attr-defined]  # a sweep pass
    assert 0 < len(fed) < len(schedule.readers)


def told(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if hasattr(record, "took")]


def test_a_sweep_says_before_what_it_will_take_and_after_what_it_took(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, "dmqfx"):
        swept(chain(), context(recorded(chain(), 6)))
    lines = [record.getMessage() for record in caplog.records]
    before = next(k for k, line in enumerate(lines) if "6 calibration rows, about " in line)
    after = next(k for k, line in enumerate(lines) if " took " in line)
    assert before < after
    (record,) = told(caplog)
    assert record.took > 0
    assert record.estimated > 0
    assert lines[after].endswith(f"took {duration(record.took)}, {duration(record.estimated)} estimated")


def test_a_sweep_without_forward_pass_is_estimated_too(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "dmqfx"):
        swept(chain(), context(recorded(chain(), 6)), (("round-weights", {"method": "nearest"}),))
    assert told(caplog)[0].estimated > 0
    assert "no forward pass, about" in caplog.text


def test_a_stream_of_rows_is_estimated_from_its_first_batch(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    batches = [{"timestep": torch.zeros(size)} for size in (4, 4, 2)]
    with caplog.at_level(logging.INFO, "dmqfx"):
        for batch in streamed(batches, 10, "look"):
            clock.now += len(batch["timestep"]) * (1.0 if len(batch["timestep"]) == 4 else 3.0)
    assert [record.getMessage() for record in caplog.records] == [
        "look: 10 rows, about 10 s",
        "look took 14 s, 10 s estimated",
    ]


# --- the budget


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.floats(1, 1e5),
    st.lists(st.tuples(st.integers(1, 3), st.floats(0, 1)), min_size=1, max_size=5),
    st.floats(0, 0.9),
)
def test_who_takes_no_more_than_his_share_leaves_the_rest_to_the_others(
    clock: Clock, seconds: float, sweeps: list[tuple[int, float]], before: float
) -> None:
    """Each pass has at least an equal part of what there was; the last may have all that is left."""
    steps = [create("fit-ranges"), create("round-weights"), create("learn-steps")]
    idle = [create("canonicalize"), create("vote-shifts"), create("round-weights", {"method": "nearest"})]
    every = [step for count, _ in sweeps for step in [*idle, *steps[:count]]]
    budget, started = Budget.over(seconds, every), clock.now
    clock.now += before * seconds
    equal = (1 - before) * seconds / sum(count for count, _ in sweeps)
    for count, used in sweeps:
        budget.allot(idle)
        budget.allot(steps[:count])
        assert budget.share >= count * equal * (1 - 1e-6)
        clock.now += used * budget.share
    assert clock.now - started <= seconds * (1 + 1e-6)
    assert budget.share >= (started + seconds - clock.now) * (1 - 1e-6)


def test_the_pipeline_gives_each_pass_its_share_when_its_turn_comes(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    steps, ctx = (
        pipeline((("fit-ranges", {}), ("measure-sensitivity", {"rows": 2}))),
        context(recorded(chain(), 6)),
    )
    budget = Budget.over(60, steps.steps)
    run_step(steps.steps[0], chain(), replace(ctx, budget=budget))
    assert (budget.share, budget.coming) == (30, 1)
    clock.now += 25
    run_step(create("measure-sensitivity", {"rows": 2}), chain(), replace(ctx, budget=budget))
    assert (budget.share, budget.coming) == (35, 0)


def test_a_budget_that_is_over_leaves_nothing(clock: Clock) -> None:
    budget = Budget.over(60, [create("learn-steps")] * 2)
    clock.now += 61
    budget.allot([create("learn-steps")])
    assert budget.share == 0


@pytest.mark.slow
def test_a_budget_reaches_the_sweep_from_compile(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "dmqfx"):
        q = compile_unet(
            one_level(),
            Path(__file__).parents[1] / "benchmarks" / "ablation" / "round-gptq.yaml",
            overrides=["pipeline.measure-sensitivity.rows=1"],
            report_rows=0,
            budget="0.001s",
        )
    assert "more than its share of the budget of 0.0 s" in caplog.text
    notes = {record.name: record.note for record in q.program.log}
    assert "rows=512" in notes["round-weights"]


def test_a_budget_that_is_no_time_is_refused_before_anything_runs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["compile", "emoji", "--budget", "soon", "--out", "nowhere"])
    assert stopped.value.code == 2
    assert "a budget is a time such as 90s, 5min, 1h or overnight, not 'soon'" in capsys.readouterr().err
    with pytest.raises(ValueError, match="a budget is a time"):
        compile_unet(emoji.load_unet(), budget="soon")
