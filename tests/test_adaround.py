"""Learned rounding: against its start, against the slope that automatic differentiation gives, and as a pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from planting import context, program_before
from sweeping import Stop, bits, chain, recorded, swept
from sweeping import context as sweep_context
from test_rounding import drawn
from torch import Tensor

import dmqfx
from dmqfx.errors import VerifyError
from dmqfx.graph.pipeline import run_step
from dmqfx.graph.registry import create
from dmqfx.graph.table import Codes, Planned
from dmqfx.numbers import adaround
from dmqfx.numbers.adaround import Annealing, annealed
from dmqfx.numbers.gptq import handed_on
from dmqfx.numbers.quant import QuantSpec
from dmqfx.numbers.ranges import search_range
from dmqfx.numbers.rounding import Reconstruction
from dmqfx.passes import round_weights
from dmqfx.sweep.budget import scaled

SPEC = QuantSpec(4, "symmetric", "channel", "mse")
QUICK = Annealing(iterations=60, rate=0.1)
LEARNED = {"method": "adaround", "rows": 64, "iterations": 40, "rate": 0.1}
STEPS = (("fit-ranges", {}), ("round-weights", LEARNED), ("correct-bias", {}))


def problem(seed: int, spec: QuantSpec = SPEC, **changed: object) -> Reconstruction:
    x, weight = drawn(seed)
    return Reconstruction(x, x @ weight.T, weight, **{"spec": spec, "damping": 0.01, **changed})  # type: ignore[arg-type]


def metric(seed: int) -> Tensor:
    directions = torch.randn(40, 16, generator=torch.Generator().manual_seed(seed))
    return directions.T @ directions / 40


STARTS: dict[str, Callable[[Reconstruction], Tensor]] = {
    "nearest": lambda each: each.nearest,
    "gptq": handed_on,
}


@given(
    st.integers(0, 50),
    st.sampled_from(sorted(STARTS)),
    st.sampled_from(("symmetric", "affine")),
    st.integers(2, 8),
    st.booleans(),
    st.sampled_from((0.0, 1.0)),
)
def test_no_loss_is_greater_than_that_of_the_start_and_no_code_leaves_the_grid(
    seed: int, start: str, grid: str, width: int, felt: bool, asymmetric: float
) -> None:
    spec = QuantSpec(width, grid, "channel", "mse")  # type: ignore[arg-type]  # drawn from the words
    each = problem(seed, spec, asymmetric=asymmetric, metric=metric(seed) if felt else None)
    begun = STARTS[start](each)
    codes = annealed(each, begun, QUICK)
    assert each.loss(codes) <= each.loss(begun)
    assert torch.equal(codes, codes.round())
    assert each.grid.qmin <= int(codes.min()) <= int(codes.max()) <= each.grid.qmax
    assert float((codes - begun).abs().max()) <= 1
    if start == "nearest":
        exact = each.grid.exact(each.weight.double())
        assert float((codes - exact).abs().max()) < 1


@pytest.mark.parametrize("seed", range(3))
def test_learning_does_better_than_the_nearest_codes(seed: int) -> None:
    each = problem(seed, metric=metric(seed))
    learned = annealed(each, each.nearest, Annealing(iterations=600))
    assert each.loss(learned) < 0.85 * each.loss(each.nearest)


def test_learning_can_better_what_gptq_found() -> None:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(32, 32, generator=generator) * torch.logspace(0, -0.3, 32)
    x = torch.randn(400, 32, generator=generator) @ mixing
    weight = torch.randn(16, 32, generator=generator)
    each = Reconstruction(x, x @ weight.T, weight, SPEC)
    gptq = handed_on(each)
    learned = annealed(each, gptq, Annealing(settling=100))
    assert each.loss(learned) < each.loss(gptq) < each.loss(each.nearest)


@pytest.mark.parametrize("felt", [False, True])
def test_the_slope_is_that_of_the_loss(felt: bool) -> None:
    each = problem(0, metric=metric(0) if felt else None)
    cells = adaround.Cells.of(each.grid, each.weight, each.nearest)
    h = torch.rand(cells.lower.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    h.requires_grad_()
    error = each.grid.real(cells.lower + h) - each.target
    weighed = error if each.felt is None else each.felt @ error
    (weighed * (error @ each.gram)).sum().backward()
    assert h.grad is not None
    found = adaround._Pull(each, cells, "relative")(h.detach().float()).double()
    ratio = found / h.grad
    assert torch.allclose(ratio, ratio.mean().expand_as(ratio), rtol=1e-3)
    assert float(ratio.mean()) > 0


def test_a_loss_of_1_for_each_weight_is_that_of_uniform_errors() -> None:
    """Many drawn errors, uniform and independent, have about the unit of the slope's loss."""
    each = problem(0)
    cells = adaround.Cells.of(each.grid, each.weight, each.nearest)
    h = torch.zeros_like(cells.lower).float()
    slope, pull = each.grid.scale[:, None] * 2, adaround._Pull(each, cells, "relative")
    unit = float((slope * ((each.grid.real(cells.lower) - each.target) @ each.gram) / pull(h)).mean())
    generator = torch.Generator().manual_seed(2)
    losses = []
    for _ in range(50):
        error = (torch.rand(h.shape, generator=generator, dtype=torch.float64) - 0.5) * each.grid.scale[
            :, None
        ]
        losses.append(float((error * (error @ each.gram)).sum()) / error.numel())
    assert sum(losses) / len(losses) == pytest.approx(unit, rel=0.1)


def test_the_same_problem_gives_the_same_bits() -> None:
    one, two = (annealed(problem(3), problem(3).nearest, QUICK) for _ in range(2))
    assert torch.equal(one, two)


def test_the_order_of_rows_does_not_matter() -> None:
    """Small whole numbers and a power of two of rows: every sum is exact in any order."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-4, 5, (256, 24), generator=generator).float()
    weight = torch.randint(-99, 100, (16, 24), generator=generator) / 64
    order = torch.randperm(256, generator=generator)
    one, two = (Reconstruction(rows, rows @ weight.T, weight, SPEC) for rows in (x, x[order]))
    assert torch.equal(one.gram, two.gram)
    assert torch.equal(annealed(one, one.nearest, QUICK), annealed(two, two.nearest, QUICK))


def test_what_the_range_clips_stays_at_its_end() -> None:
    each = problem(0, QuantSpec(2, "symmetric", "channel", "mse"))
    exact = each.weight.double() / each.grid.scale[:, None]
    clipped = (exact >= each.grid.qmax) | (exact <= each.grid.qmin)
    codes = annealed(each, each.nearest, QUICK)
    assert bool(clipped.any())
    assert not torch.equal(codes, each.nearest)
    assert torch.equal(codes[clipped], each.nearest[clipped])


def test_weights_that_never_settle_round_worse() -> None:
    each, how = problem(1), Annealing(iterations=300)
    settled, open_to_the_end = (
        annealed(each, each.nearest, replace(how, settling=weight)) for weight in (how.settling, 0.0)
    )
    assert each.loss(settled) < 0.9 * each.loss(open_to_the_end)


def test_an_absolute_loss_does_what_a_relative_one_does_with_the_settling_that_it_comes_to() -> None:
    """0.01 against the squared error of a position, as published, is another number against our unit."""
    each = problem(1)
    expected = each.grid.scale.square().sum() / 12 * each.gram.diagonal().sum() / each.weight.numel()
    absolute = annealed(each, each.nearest, replace(QUICK, settling=0.01, loss="absolute"))
    relative = annealed(each, each.nearest, replace(QUICK, settling=0.01 / float(expected)))
    assert float((absolute != relative).double().mean()) < 0.01
    other = annealed(each, each.nearest, replace(QUICK, settling=0.01))
    assert float((other != absolute).double().mean()) > 0.01


def test_an_absolute_loss_does_not_depend_on_the_unit_of_what_the_output_feels() -> None:
    """measure-sensitivity sums over rows and positions: with more of them the same metric is larger."""
    how = replace(QUICK, settling=0.01, loss="absolute")
    few, many = (problem(1, metric=metric(1) * unit) for unit in (1.0, 4096.0))
    assert torch.equal(annealed(few, few.nearest, how), annealed(many, many.nearest, how))


def test_the_grid_is_searched_with_the_norm() -> None:
    each = problem(1)
    other = replace(each, norm=8.0)
    assert not torch.equal(other.grid.scale, each.grid.scale)
    for own, power in ((each, 2), (other, 8)):
        errors = [(q.grid.real(q.nearest) - q.weight.double()).abs().pow(power).sum(1) for q in (each, other)]
        least = errors[0] if own is each else errors[1]
        assert bool((least <= torch.stack(errors).amin(0) * (1 + 1e-5)).all())


def test_a_start_that_learning_cannot_better_is_kept() -> None:
    each = problem(0)
    best = annealed(each, handed_on(each), Annealing(iterations=600))
    assert annealed(each, best, Annealing(iterations=1)) is best


# --- as a pass


def past_the_next(honest: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def wrong(*given: object) -> Tensor:
        codes = honest(*given).clone()
        codes[0, 0] += 2 if codes[0, 0] <= 0 else -2
        return codes

    return wrong


def of_the_next_channel(honest: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *given: honest(*given).roll(1, 0)


def upside_down(honest: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *given: -1 - honest(*given)


@pytest.mark.parametrize("wrong", [past_the_next, of_the_next_channel, upside_down])
def test_planted_wrong_codes_are_rejected(
    wrong: Callable[..., Callable[..., Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(round_weights, "annealed", wrong(annealed))
    with pytest.raises(VerifyError, match=r"Codes of .* past the next code"):
        dmqfx.verify(
            program_before("round-weights", "shifts"), create("round-weights", LEARNED), context("shifts")
        )


@pytest.mark.parametrize("start", sorted(STARTS))
def test_honest_codes_pass_verification_and_the_journal_tells_the_gain(start: str) -> None:
    before, step = (
        program_before("round-weights", "shifts"),
        create("round-weights", {**LEARNED, "start": start}),
    )
    assert dmqfx.verify(before, step, context("shifts")).error == 0
    after = run_step(step, before, context("shifts"))
    learned = [entry for entry in after.table.of(Codes).values() if not entry.nearest]
    assert learned
    assert {entry.adjacent for entry in learned} == {start == "nearest"}
    told = [each for each in after.log[-1].applied if each.rule == "adaround"]
    assert len(told) == len(learned)
    for application in told:
        assert f"of the loss of {start}" in application.what or f"no gain over {start}" in application.what


@pytest.mark.parametrize(("method", "own"), [("adaround", True), ("gptq", False)])
def test_codes_beside_the_weight_have_its_grid_whatever_the_target(method: str, own: bool) -> None:
    """Those that are handed on, beside the target, have the target's."""
    options = {"method": method, "asymmetric": 1, "norm": 2.4, "rows": 512, "damping": 0.01}
    if method == "adaround":
        options |= {"iterations": 5}
    program, step = chain(4), {**options, "biases": False}
    after = swept(program, sweep_context(recorded(program, 9)), (("fit-ranges", {}), ("round-weights", step)))
    same = {}
    for site, entry in after.table.of(Codes).items():
        planned = after.table.get(site, Planned)
        assert planned is not None
        assert planned.spec is not None
        wanted = search_range(program.constant_at(site), planned.spec, norm=2.4)
        same[str(site)] = torch.equal(entry.qparams.scale, wanted.scale)
    assert len(same) > 3
    assert all(same.values()) if own else not all(same.values())


def test_adaround_from_the_nearest_codes_comes_closer_to_wanted_outputs_on_the_weights_own_grid() -> None:
    """Of inputs that mostly lie in 20 of 90 directions: the solved weight is far wider than the float one."""
    noise = torch.Generator().manual_seed(0)
    x = torch.randn(600, 20, generator=noise) @ torch.randn(20, 90, generator=noise)
    x = x + 0.05 * torch.randn(x.shape, generator=noise)
    weight, given_ = torch.randn(16, 90, generator=noise), x + 0.1 * torch.randn(x.shape, generator=noise)
    errors = []
    for frozen in (False, True):
        each = Reconstruction(
            given_, x @ weight.T, weight, SPEC, 0.0, 1.0, norm=2.4, centred=False, frozen=frozen
        )
        codes = annealed(each, each.nearest, Annealing(iterations=200))
        errors.append(float((given_.double() @ each.grid.real(codes).T - each.wanted).square().mean()))
    assert errors[1] < 0.5 * errors[0]


def test_a_time_budget_changes_iterations_only_where_they_are_made() -> None:
    gptq, learned = create("round-weights", {"method": "gptq"}), create("round-weights", LEARNED)
    assert scaled(gptq, 4.0) == gptq
    assert scaled(learned, 4.0) == create("round-weights", {**LEARNED, "iterations": 160})


@pytest.mark.parametrize("at", ["conv3/conv2d:input", "time/linear:input"])
def test_an_interrupted_run_ends_with_the_same_bits(tmp_path: Path, at: str) -> None:
    def run(folder: Path) -> dict[str, bytes]:
        ctx = sweep_context(recorded(chain(), 9), run_dir=folder)
        return bits(swept(chain(), ctx, STEPS, Stop()).table)

    whole = run(tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stop, "at", at)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut")
    assert run(tmp_path / "cut") == whole
