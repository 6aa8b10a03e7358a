"""The range search finds what trying everything would find, and never does worse than the full range."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dmqfx.errors import CalibrationError
from dmqfx.numbers import ranges
from dmqfx.numbers.quant import QParams, QuantSpec, fake_quantize
from dmqfx.numbers.ranges import search_range

WEIGHT_SPECS = st.builds(
    QuantSpec,
    bits=st.integers(2, 8),
    grid=st.sampled_from(("affine", "symmetric")),
    per=st.sampled_from(("tensor", "channel")),
    range=st.just("mse"),
)


def weights(seed: int, shape: tuple[int, ...] = (6, 40), heavy: bool = True) -> Tensor:
    """Rows of different spread and offset; `heavy` gives some of them outliers."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=generator)
    w = w * torch.logspace(-3, 1, shape[0])[:, None] + torch.randn(shape[0], 1, generator=generator) * 0.01
    return w * (1 + 30 * (torch.rand(shape, generator=generator) > 0.97)) if heavy else w


def minmax(spec: QuantSpec) -> QuantSpec:
    return QuantSpec(spec.bits, spec.grid, spec.per)


def loss(w: Tensor, params: QParams, norm: float) -> Tensor:
    error = (fake_quantize(w.double(), widened(params)) - w.double()).abs() ** norm
    return error.sum(1) if params.scale.shape[1] > 1 else error.sum().reshape(1)


def widened(params: QParams) -> QParams:
    return QParams(params.scale.double(), params.zero_point, params.qmin, params.qmax, params.axis)


@given(WEIGHT_SPECS, st.integers(0, 1000), st.sampled_from((2.0, 2.4)))
def test_the_search_is_never_worse_than_the_full_range(spec: QuantSpec, seed: int, norm: float) -> None:
    w = weights(seed)
    found = loss(w, search_range(w, spec, norm=norm), norm)
    assert (found <= loss(w, search_range(w, minmax(spec)), norm) * (1 + 1e-5)).all()


@given(WEIGHT_SPECS, st.integers(0, 1000), st.sampled_from((2.0, 2.4)))
def test_the_search_finds_what_trying_every_range_finds(spec: QuantSpec, seed: int, norm: float) -> None:
    w = weights(seed)
    full = search_range(w, minmax(spec))
    tried = [
        loss(w, QParams(full.scale * (1 - i / 100), full.zero_point, full.qmin, full.qmax, full.axis), norm)
        for i in range(80)
    ]
    found = loss(w, search_range(w, spec, norm=norm), norm)
    torch.testing.assert_close(found, torch.stack(tried).amin(0), rtol=1e-4, atol=0)


def test_outliers_are_clipped_when_bits_are_few() -> None:
    w = torch.randn(4, 4000)
    w[:, 0] = 40
    spec = QuantSpec(4, "symmetric", "channel", "mse")
    searched, full = search_range(w, spec), search_range(w, minmax(spec))
    assert (searched.scale < 0.5 * full.scale).all()
    assert (loss(w, searched, 2) < 0.4 * loss(w, full, 2)).all()


def test_equal_errors_keep_the_larger_range() -> None:
    w = torch.zeros(3, 8)
    w[1] = 3.0
    w[2, 0] = -2.0
    for grid in ("affine", "symmetric"):
        spec = QuantSpec(4, grid, "channel", "mse")
        assert torch.equal(search_range(w, spec).scale, search_range(w, minmax(spec)).scale)


def test_constant_and_zero_channels_come_back_exactly() -> None:
    w = torch.tensor([[0.0] * 4, [5.0] * 4, [-5.0] * 4, [1e-30] * 4])
    for grid in ("affine", "symmetric"):
        params = search_range(w, QuantSpec(4, grid, "channel", "mse"))
        assert params.scale.isfinite().all()
        assert (params.scale > 0).all()
        torch.testing.assert_close(fake_quantize(w, params), w, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_a_weight_that_is_not_finite_names_its_channel(bad: float, method: str) -> None:
    w = torch.ones(3, 2, 1, 1)
    w[2, 1] = bad
    with pytest.raises(CalibrationError, match="output channel 2"):
        search_range(w, QuantSpec(4, "symmetric", "tensor", method))


@pytest.mark.parametrize("per", ["tensor", "channel"])
@pytest.mark.parametrize("grid", ["affine", "symmetric"])
def test_cutting_a_weight_into_blocks_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, per: str, grid: str
) -> None:
    w = weights(3, (7, 50))
    spec = QuantSpec(4, grid, per, "mse")
    whole = search_range(w, spec)
    for block in (16, 120):
        monkeypatch.setattr(ranges, "_BLOCK", block)
        assert torch.equal(search_range(w, spec).scale, whole.scale)


def test_a_convolution_has_one_scale_for_each_output_channel() -> None:
    params = search_range(torch.randn(5, 3, 2, 2), QuantSpec(4, "symmetric", "channel", "mse"))
    assert (params.scale.shape, params.zero_point.shape, params.axis) == ((1, 5), (1, 5), 0)
    assert search_range(torch.randn(5, 3), QuantSpec(4)).axis is None


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)],
)
def test_scales_follow_the_precision_of_the_weight(dtype: torch.dtype, kept: torch.dtype) -> None:
    w = weights(0, heavy=False).to(dtype)
    before = w.clone()
    params = search_range(w, QuantSpec(4, "symmetric", "channel", "mse"))
    assert params.scale.dtype == kept
    assert torch.equal(w, before)
