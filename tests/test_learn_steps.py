"""Steps learned for the output: less error there, codes as they were, the same bits after a kill."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sweeping
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planting import context, program_before
from sweeping import bits, chain, output
from torch import Tensor

import dmqfx
from dmqfx.checking.tablecheck import broken_claims
from dmqfx.errors import CalibrationError
from dmqfx.graph.blocks import blocks
from dmqfx.graph.facts import STEPPED
from dmqfx.graph.journal import Journal
from dmqfx.graph.pipeline import PassContext, run_step
from dmqfx.graph.program import Program
from dmqfx.graph.registry import create
from dmqfx.graph.table import Bias, Codes, Shift
from dmqfx.numbers import speeds
from dmqfx.numbers.quant import QParams, QuantSpec, params_from_range
from dmqfx.runtime.operators import timestep_group
from dmqfx.sweep import stepplan, stepsweep
from dmqfx.sweep.budget import Budget
from dmqfx.sweep.chunks import Chunk
from dmqfx.sweep.deploy import _Input, deployed_input
from dmqfx.sweep.endtoend import FARTHEST, Descent, Steps, _like_neighbours, practise
from dmqfx.sweep.network import Network

QUICK = {"rows": 12, "batch": 4, "iterations": 30, "groups": 4}


def before() -> Program:
    return program_before("learn-steps", "shifts")


def ready(folder: Path | None = None, **changes: Any) -> PassContext:
    return replace(context("shifts"), run_dir=folder, **changes)


def learned(ctx: PassContext, **options: object) -> Program:
    return run_step(create("learn-steps", {**QUICK, **options}), before(), ctx)


@cache
def after() -> Program:
    return learned(ready())


def steps_of(program: Program) -> dict[str, Tensor]:
    table = program.table
    inputs = {str(site): entry.scale for site, entry in table.of(QParams).items()}
    return inputs | {str(site): entry.qparams.scale for site, entry in table.of(Codes).items()}


def error(program: Program, groups: int) -> Tensor:
    """The mean squared error of each timestep group at the output, counted on the lowered graph.

    Shapes: float64 [groups].
    """
    data = context("shifts").calibration
    assert data is not None
    lowered = program
    for name in ("insert-qdq", "lower-simulate"):
        lowered = run_step(create(name), lowered, context("shifts"))
    edges = torch.tensor([1000 * k / groups for k in range(1, groups)])
    sums = torch.zeros(2, groups, dtype=torch.float64)
    for batch in data.batches(4, program.inputs, dtype=program.dtype):
        with torch.no_grad():
            real, quantized = (output(each.gm(**batch)) for each in (before(), lowered))
        off = (real - quantized).double().square().flatten(1).mean(1)
        group = timestep_group(batch["timestep"], edges)
        sums[0].index_add_(0, group, off)
        sums[1].index_add_(0, group, torch.ones_like(off))
    return sums[0] / sums[1].clamp(min=1)


def test_what_is_left_of_the_error_is_what_the_record_says() -> None:
    """All twelve rows are learned from, so the lowered graph's outputs can be held against the words."""
    data = context("shifts").calibration
    assert data is not None
    assert len(data) <= QUICK["rows"]
    was, now = (error(program, QUICK["groups"]) for program in (before(), after()))
    live = was > 0
    left = float((now / was)[live].mean())
    told = after().log[-1].applied[0].what
    assert told.endswith("of the error at the output is left")
    assert left == pytest.approx(float(told.split()[0]), rel=0.02)
    assert left < 0.95


def test_codes_zero_points_and_shifts_stay_and_steps_go_no_farther_than_twice() -> None:
    old, new = before().table, after().table
    for site, codes in old.of(Codes).items():
        found = new.get(site, Codes)
        assert found is not None
        assert torch.equal(found.packed, codes.packed)
        assert torch.equal(found.qparams.zero_point, codes.qparams.zero_point)
    for site, params in old.of(QParams).items():
        there = new.get(site, QParams)
        assert there is not None
        assert torch.equal(there.zero_point, params.zero_point)
    assert {s: e.exponent.tolist() for s, e in new.of(Shift).items()} == {
        s: e.exponent.tolist() for s, e in old.of(Shift).items()
    }
    was, now = steps_of(before()), steps_of(after())
    assert was.keys() == now.keys()
    assert all(bool(((now[name] / was[name]).log2().abs() <= 1.00001).all()) for name in was)
    assert sum(not torch.equal(now[name], was[name]) for name in was) > len(was) / 2
    assert new.of(Bias).keys() > old.of(Bias).keys()


def test_steps_that_want_to_go_farther_are_held() -> None:
    far = learned(ready(), rate=3.0, iterations=4, warmup=0.0)
    was, now = steps_of(before()), steps_of(far)
    if far.log[-1].applied:
        assert max(float((now[name] / was[name]).max()) for name in was) <= FARTHEST * 1.00001
    else:
        assert all(torch.equal(now[name], was[name]) for name in was)
        assert all("what was there is kept" in refusal.reason for refusal in far.log[-1].refused)


def test_the_bound_puts_back_what_went_too_far() -> None:
    steps = Steps(before(), before().table, Network(before()).nodes)
    with torch.no_grad():
        for k, each in enumerate(steps.numbers):
            each.fill_(3.0 if k % 2 else -3.0)
    steps.bound()
    was, ratios = before().table, list[Tensor]()
    for site, entry in steps.entries().items():
        if isinstance(entry, QParams):
            ratios.append(entry.scale / was.of(QParams)[site].scale)
        elif isinstance(entry, Codes):
            ratios.append(entry.qparams.scale / was.of(Codes)[site].qparams.scale)
    factors = torch.cat([each.flatten() for each in ratios])
    assert set(factors.log2().round(decimals=4).tolist()) == {1.0, -1.0}


def test_steps_without_gain_are_refused_and_what_was_there_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every slope pointed the other way."""
    honest = stepsweep._slopes

    def turned(objective: Any, steps: Steps, k: int, plan: Any) -> float:
        loss = honest(objective, steps, k, plan)
        for each in steps.numbers:
            assert each.grad is not None
            each.grad.neg_()
        return loss

    monkeypatch.setattr(stepsweep, "_slopes", turned)
    worse = learned(ready())
    assert bits(worse.table) == bits(before().table)
    assert worse.log[-1].applied == ()
    assert {r.at for r in worse.log[-1].refused} == {a.at for a in after().log[-1].applied}
    assert "of the error at the output is left; what was there is kept" in worse.log[-1].refused[0].reason


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([4, 6, 8]),
    st.sampled_from(["affine", "symmetric"]),
    st.booleans(),
    st.booleans(),
)
def test_the_slope_of_a_step_is_that_of_lsq(
    seed: int, bits_: int, grid: str, shifted: bool, scaled: bool
) -> None:
    """d Q(x) / d step: the code where it is clipped, else what rounding adds, both in units of the step."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 5, 3, generator=generator) * 2
    timestep = torch.linspace(0, 999, 6)
    spec = QuantSpec(bits_, grid, boundaries=(300.0, 600.0))  # type: ignore[arg-type]  # looked at above
    ends = torch.rand(2, 3, 1, generator=generator) + 0.5
    params = params_from_range(-ends[0], ends[1], spec, 1)
    exponent = torch.randint(0, 3, (3, 5), generator=generator).to(torch.uint8)
    shift = Shift(exponent, 2) if shifted else None
    gamma = torch.rand(5, generator=generator) + 0.5 if scaled else None
    step = params.scale.clone().requires_grad_()
    out = _Input(params, gamma, shift, 1)(x, timestep, step)
    plain = deployed_input(x, params, gamma, shift, timestep, 1)
    assert torch.allclose(out, plain, atol=1e-5)
    group = torch.bucketize(timestep, torch.tensor(spec.boundaries), right=True)
    factor = shift.factor[group][:, :, None] if shift is not None else torch.ones(6, 1, 1)
    own = params.scale[group][:, :, None] * factor
    zero = params.zero_point[group][:, :, None]
    exact = (x if gamma is None else x / gamma[None, :, None]) / own + zero
    code = exact.round().clamp(params.qmin, params.qmax)
    clipped = (exact < params.qmin) | (exact > params.qmax)
    ties = (((exact % 1) - 0.5).abs() < 1e-3) | ((exact - code).abs() > 0.5) & ~clipped
    edges = ((exact - params.qmin).abs() < 1e-3) | ((exact - params.qmax).abs() < 1e-3)
    term = torch.where(clipped, code - zero, code - exact) * factor
    drawn = (
        torch.randn(out.shape, generator=generator).abs() * term.sign()
    )  # of one sign: nothing cancels out
    weight = drawn * ~(ties | edges)  # which code is a matter of last digits there
    (slope,) = torch.autograd.grad((out * weight).sum(), step)
    each = term * weight
    wanted = torch.zeros(3).index_add_(0, group, each.flatten(1).sum(1))[:, None]
    assert float((slope - wanted).abs().max()) < 1e-4 * float(each.abs().sum())
    assert float(wanted.abs().max()) > 0.3 * float(each.abs().sum()) > 0


@pytest.mark.slow
def test_what_is_not_kept_is_computed_again_and_parts_of_a_batch_add_up() -> None:
    """Little memory: the same but for the order of sums, of which Adam makes more where slopes are next to nothing."""
    tight = learned(ready(memory=1))
    left, before_ = (float(each.log[-1].applied[0].what.split()[0]) for each in (tight, after()))
    assert left == pytest.approx(before_, rel=0.03)
    was, now = steps_of(after()), steps_of(tight)
    off = torch.cat([(now[name] / was[name]).log().abs().flatten() for name in was])
    assert float(off.median()) < 5e-4  # 1.5e-4 on a processor without AVX-512


def test_sparing_memory_keeps_less_and_gives_the_same_slopes() -> None:
    network = Network(before())
    steps = Steps(before(), before().table, network.nodes)
    data = context("shifts").calibration
    assert data is not None
    batch = next(data.batches(4, before().inputs, dtype=before().dtype))
    chunk = Chunk(batch, batch["timestep"], 0)
    whole, spared = network.kept(chunk, steps.twins, steps.learned())
    assert 0 < spared < 0.8 * whole
    found = []
    for network.sparing in (False, True):
        with torch.enable_grad():
            network(chunk, steps.twins, steps.learned()).square().sum().backward()  # type: ignore[no-untyped-call]  # torch has no types for it
        found.append([each.grad for each in steps.numbers])
        for each in steps.numbers:
            each.grad = None
    assert all(each is not None for slopes in found for each in slopes)
    for one, two in zip(*found, strict=True):
        assert float((one - two).norm()) <= 1e-4 * float(one.norm())
    assert sum(float(one.norm()) > 0 for one in found[0]) > len(found[0]) / 2


@pytest.mark.parametrize(
    "stop", [pytest.param(1, marks=pytest.mark.slow), 7, pytest.param(29, marks=pytest.mark.slow)]
)
def test_iterations_are_not_made_again_and_the_bits_are_those_of_a_whole_run(
    tmp_path: Path, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stepsweep, "_OFTEN", 0.0)
    honest, made = stepsweep._slopes, list[int]()

    def counted(objective: Any, steps: Steps, k: int, plan: Any) -> float:
        made.append(k)
        if len(made) == stop + 1 and stop:
            raise KeyboardInterrupt
        return honest(objective, steps, k, plan)

    monkeypatch.setattr(stepsweep, "_slopes", counted)
    with pytest.raises(KeyboardInterrupt):
        learned(ready(tmp_path))
    made.clear()
    stop, left = 0, 30 - stop
    again = learned(ready(tmp_path))
    assert len(made) == left
    assert bits(again.table) == bits(after().table)
    assert again.log[-1].applied == after().log[-1].applied


@pytest.mark.parametrize(("long", "most"), [(math.inf, 4), (0.0, 2)])
def test_a_step_is_tried_on_two_rows_where_it_takes_long(
    monkeypatch: pytest.MonkeyPatch, long: float, most: int
) -> None:
    tried: list[int] = []

    def practised(network: Network, steps: Steps, chunk: Chunk) -> None:
        tried.append(len(chunk.timestep))
        practise(network, steps, chunk)

    monkeypatch.setattr(stepplan, "practise", practised)
    monkeypatch.setattr(speeds, "_LONG", long)
    learned(ready(), iterations=1)
    assert max(tried) == most


def test_time_and_memory_are_told_before_and_the_time_after(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "dmqfx"):
        learned(ready(), iterations=3)
    (told,) = [record for record in caplog.records if hasattr(record, "memory")]
    (took,) = [record for record in caplog.records if hasattr(record, "took")]
    assert told.getMessage().startswith("learn-steps, 12 calibration rows, about ")
    assert told.memory > 0
    assert took.took > 0
    assert took.estimated > 0


def test_a_budget_takes_rows_and_iterations_and_the_record_says_so(tmp_path: Path) -> None:
    little = learned(ready(tmp_path, budget=Budget(1e-3)), iterations=32)
    assert "rows=1, batch=4, iterations=2," in little.log[-1].note
    much = learned(ready(budget=Budget(3600.0)), iterations=2)
    assert much.log[-1].note == ""  # more iterations learn the rows by heart


def test_groups_without_rows_move_like_the_nearest_that_has_some() -> None:
    moved = torch.tensor([[0.0, 0.0], [0.1, 0.0], [0.0, 0.0], [0.0, 0.0], [0.3, 0.2]])
    assert _like_neighbours(moved).tolist() == moved[[1, 1, 1, 4, 4]].tolist()
    for as_it_is in (torch.zeros(3, 1), moved[[1, 4]]):
        assert torch.equal(_like_neighbours(as_it_is), as_it_is)


def test_the_same_seed_gives_the_same_bits() -> None:
    assert bits(learned(ready()).table) == bits(after().table)
    assert bits(learned(ready(seed=1)).table) != bits(after().table)


def test_steps_stay_learned_when_codes_are_made_anew() -> None:
    again = run_step(create("round-weights", {"method": "nearest"}), after(), context("shifts"))
    assert STEPPED in again.facts
    assert list(broken_claims(again)) == []


def test_fuel_bounds_the_sites() -> None:
    few = ready(journal=Journal(fuel=2))
    found = create("learn-steps", QUICK).run(before(), few)
    assert tuple(few.journal.applied) == after().log[-1].applied[:2]
    changed = {name for name, value in steps_of(found).items() if value is not steps_of(before())[name]}
    assert len(changed) == 2
    none = ready(journal=Journal(fuel=0))
    assert create("learn-steps", QUICK).run(before(), none) is before()


def test_honest_steps_pass_verification() -> None:
    assert dmqfx.verify(before(), create("learn-steps", QUICK), ctx=context("shifts")).error == 0


def test_rows_that_are_not_finite_are_named() -> None:
    data = context("shifts").calibration
    assert data is not None
    (group,) = data.groups
    column = group.columns["sample"]
    values = column.values.clone()
    values[column.index[3]] = 3e38
    broken = replace(group, columns={**group.columns, "sample": replace(column, values=values)})
    with pytest.raises(
        CalibrationError, match=r"conv_in/conv2d: the float network's value is not finite for .* row 3"
    ):
        learned(ready(calibration=replace(data, groups=(broken,))))


def test_a_loss_that_is_not_finite_ends_it_and_names_the_rate() -> None:
    with pytest.raises(
        CalibrationError, match=r"a loss that is not finite\n  mend: a smaller rate than 1e\+30"
    ):
        learned(ready(), rate=1e30)


def test_a_value_that_is_read_outside_of_a_block_is_no_matter() -> None:
    """The block is then no stretch of its own; the one behind it is."""
    program = chain(4, residual=True, peeked=True)
    outside = [block for block in blocks(program) if block.read_outside is not None]
    assert len(outside) == 1
    data = sweeping.recorded(program, 12)
    steps = [("measure-sensitivity", {"rows": 4}), *sweeping.SWEEP, ("learn-steps", QUICK)]
    assert sweeping.swept(program, sweeping.context(data), steps).log[-1].applied


def test_without_calibration_it_says_what_is_missing() -> None:
    with pytest.raises(CalibrationError, match="learn-steps needs calibration data; pass calibration="):
        learned(ready(calibration=None))


def test_the_rate_grows_and_falls() -> None:
    how = Descent(100, 1.0, 0.1)
    factors = [how.factor(k) for k in range(100)]
    assert factors[:10] == sorted(factors[:10])
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert 0 < factors[-1] < 0.01 < 0.9 < max(factors) <= 1


@pytest.mark.parametrize(
    ("option", "value"),
    [("rows", 0), ("batch", 0), ("iterations", 0), ("groups", 0), ("rate", 0), ("warmup", 2)],
)
def test_options_out_of_bounds_are_refused(option: str, value: float) -> None:
    with pytest.raises(Exception, match=f"{option} must be"):
        create("learn-steps", {option: value})
