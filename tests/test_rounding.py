"""Rounding that minds the output: codes against the nearest ones, on problems with a known answer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dmqfx.numbers.gptq import handed_on
from dmqfx.numbers.parts import Wide
from dmqfx.numbers.quant import QuantSpec, dequantize, quantize
from dmqfx.numbers.ranges import search_range
from dmqfx.numbers.rounding import Reconstruction, Rounded, ridge

SPEC = QuantSpec(4, "symmetric", "channel", "mse")


def drawn(seed: int, rows: int = 400, columns: int = 24, out: int = 16) -> tuple[Tensor, Tensor]:
    """Correlated inputs with a mean, and a weight."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) * torch.logspace(0, -2, columns)
    x = torch.randn(rows, columns, generator=generator) @ mixing + 0.5
    return x, torch.randn(out, columns, generator=generator)


def problem(x: Tensor, weight: Tensor, **changed: object) -> Reconstruction:
    return Reconstruction(x, x @ weight.T, weight, **{"spec": SPEC, "damping": 0.01, **changed})  # type: ignore[arg-type]


def reconstruct(problem: Reconstruction) -> Rounded:
    """As `gptq` rounds."""
    return problem.rounded(handed_on(problem))


def real(found: Rounded) -> Tensor:
    return dequantize(found.codes, found.params.scale, found.params.zero_point, None, 0)


def nearest(weight: Tensor) -> Tensor:
    params = search_range(weight, SPEC)
    codes = quantize(weight, params.scale, params.zero_point, None, 0, params.qmin, params.qmax)
    return dequantize(codes, params.scale, params.zero_point, None, 0)


def noise(x: Tensor, change: Tensor, metric: Tensor | None = None) -> float:
    """The mean energy of what a change of the weight does to the centred output, in a metric."""
    error = ((x - x.mean(0)) @ change.T).double()
    return float((error @ (torch.eye(error.shape[1]).double() if metric is None else metric) * error).sum())


def test_handing_errors_on_halves_the_noise_of_the_nearest_codes() -> None:
    handed, plain = [], []
    for x, weight in map(drawn, range(5)):
        handed.append(noise(x, real(reconstruct(problem(x, weight))) - weight))
        plain.append(noise(x, nearest(weight) - weight))
    assert all(a < b for a, b in zip(handed, plain, strict=True))
    assert sum(handed) < 0.5 * sum(plain)


@pytest.mark.parametrize("seed", range(5))
def test_a_metric_moves_the_error_to_where_it_is_felt_least(seed: int) -> None:
    x, weight = drawn(seed)
    generator = torch.Generator().manual_seed(100 + seed)
    directions = torch.randn(200, 4, generator=generator) @ torch.randn(4, 16, generator=generator)
    metric = (directions.T @ directions / 200 + 0.01 * torch.eye(16)).double()
    blind, aware = (reconstruct(problem(x, weight, metric=m)) for m in (None, metric))
    assert noise(x, real(aware) - weight, metric) < 0.7 * noise(x, real(blind) - weight, metric)


def test_a_metric_of_independent_channels_changes_nothing() -> None:
    x, weight = drawn(0)
    plain, weighed = (
        reconstruct(problem(x, weight, metric=m)) for m in (None, torch.diag(torch.arange(1.0, 17.0)))
    )
    assert torch.equal(plain.codes, weighed.codes)


def test_rows_without_importance_do_not_count() -> None:
    x, weight = drawn(0)
    importance = (torch.arange(len(x)) < 300).float()
    some = reconstruct(problem(x, weight, importance=importance))
    only = reconstruct(problem(x[:300], weight))
    assert torch.equal(some.codes, only.codes)


def test_the_offset_makes_up_for_the_mean() -> None:
    x, weight = drawn(1)
    found = reconstruct(problem(x, weight))
    lacking = (x.double() @ (weight - real(found)).T.double()).mean(0) - found.offset
    assert float(lacking.abs().max()) < 1e-5


def test_the_asymmetric_target_makes_up_for_what_happened_upstream() -> None:
    x, weight = drawn(2)
    given = x * torch.linspace(0.8, 1.2, x.shape[1])  # upstream, quantization has scaled the inputs
    wanted = x @ weight.T
    errors = []
    for share in (0.0, 1.0):
        found = reconstruct(Reconstruction(given, wanted, weight, SPEC, 0.001, share))
        errors.append(float((given @ real(found).T + found.offset - wanted).square().mean()))
    assert errors[1] < 0.5 * errors[0]


def test_a_frozen_grid_is_that_of_the_weight_and_else_that_of_the_target() -> None:
    x, weight = drawn(2)
    given = x * torch.linspace(0.8, 1.2, x.shape[1])
    free, frozen = (
        Reconstruction(given, x @ weight.T, weight, SPEC, 0.001, 1.0, norm=2.4, frozen=each)
        for each in (False, True)
    )
    assert torch.equal(frozen.params.scale, search_range(weight, SPEC, norm=2.4).scale)
    assert torch.equal(free.params.scale, search_range(free.target.float(), SPEC, norm=2.4).scale)
    assert not torch.equal(free.params.scale, frozen.params.scale)


def test_no_damping_is_next_to_none_and_not_much() -> None:
    """An inverse wants a little."""
    x, weight = drawn(3)
    none, little, much = (handed_on(problem(x, weight, damping=d)) for d in (0.0, 1e-6, 1.0))
    assert torch.equal(none, little)
    assert not torch.equal(none, much)
    assert ridge(0.0, 5.0) == ridge(1e-6, 5.0) == pytest.approx(5e-6)
    assert ridge(0.1, 5.0) == 0.5
    assert ridge(0.0, 0.0) == ridge(0.1, 0.0) == 1.0


@pytest.mark.parametrize("columns", [24, 8])
def test_without_a_bias_the_mean_counts_in_the_codes(columns: int) -> None:
    """In parts, too: inputs that are far from 0 on average, whose common error no bias takes."""
    x, weight = drawn(5)
    x = x + 3
    errors = {}
    for centred in (True, False):
        whole = problem(x, weight, centred=centred)
        wide = Wide(whole, widest=columns)
        found = wide.rounded(wide.solved(handed_on))
        errors[centred] = float(((real(found) - weight) @ x.mean(0)).square().sum())
        assert bool(found.offset.any()) == centred
    assert errors[False] < errors[True] / 2


@pytest.mark.parametrize("dead", ["column", "all", "constant"])
def test_inputs_that_never_vary_give_codes_all_the_same(dead: str) -> None:
    x, weight = drawn(3)
    x = x.clone()
    x[:, : 1 if dead == "column" else None] = 0.0 if dead != "constant" else 2.0
    found = reconstruct(problem(x, weight))
    assert torch.isfinite(real(found)).all()
    assert torch.isfinite(found.offset).all()
    assert found.codes.shape == weight.shape


def test_affine_grids_keep_to_their_codes() -> None:
    x, weight = drawn(4)
    spec = QuantSpec(3, "affine", "channel", "mse")
    found = reconstruct(problem(x, weight.abs(), spec=spec))
    assert found.codes.dtype == torch.uint8
    assert 0 <= int(found.codes.min()) <= int(found.codes.max()) <= 7
