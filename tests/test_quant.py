"""What quantization promises: zero exact, errors of half a step, codes in range, parameters always usable."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dmqfx.errors import CalibrationError
from dmqfx.numbers.quant import QuantSpec, dequantize, fake_quantize, params_from_range, qrange, quantize

GRIDS = ("affine", "symmetric")
NUMBERS = st.floats(-1e6, 1e6, width=32)
SPECS = st.builds(QuantSpec, bits=st.integers(2, 8), grid=st.sampled_from(GRIDS), per=st.just("tensor"))


def bounds(values: list[float]) -> tuple[Tensor, Tensor]:
    x = torch.tensor(values)
    return x.min().reshape(1, 1), x.max().reshape(1, 1)


@given(SPECS, st.lists(NUMBERS, min_size=1, max_size=30))
def test_inside_the_range_the_error_is_at_most_half_a_step(spec: QuantSpec, values: list[float]) -> None:
    x = torch.tensor(values, dtype=torch.float64)
    params = params_from_range(x.min().reshape(1, 1), x.max().reshape(1, 1), spec, None)
    error = (fake_quantize(x, params) - x).abs()
    assert error.max() <= params.scale.item() / 2 * (1 + 1e-9)


@given(st.data())
def test_each_row_and_channel_is_rounded_by_half_a_step_of_its_own_at_most(data: st.DataObject) -> None:
    """x [B, C, N] or [B, N, C] inside ranges [G, C] that need not hold 0, each row in a group of its own."""
    groups, channels, rows = (data.draw(st.integers(1, 4)) for _ in range(3))
    axis, per = data.draw(st.sampled_from((1, -1))), data.draw(st.sampled_from(("tensor", "channel")))
    spec = QuantSpec(
        data.draw(st.integers(2, 8)),
        data.draw(st.sampled_from(GRIDS)),
        per,
        "minmax",
        tuple(range(1, groups)),
    )
    ends = data.draw(
        st.lists(st.tuples(NUMBERS, NUMBERS), min_size=groups * channels, max_size=groups * channels)
    )
    low, high = torch.tensor(ends, dtype=torch.float64).sort(1).values.T.reshape(2, groups, channels)
    group = torch.tensor(data.draw(st.lists(st.integers(0, groups - 1), min_size=rows, max_size=rows)))
    between = torch.tensor(data.draw(st.lists(st.floats(0, 1), min_size=5, max_size=5)), dtype=torch.float64)
    x = low[group][..., None] + (high - low)[group][..., None] * between
    params = params_from_range(low, high, spec, axis)
    step = params.scale[group].expand(rows, channels)[..., None]
    there = x if axis == 1 else x.transpose(1, 2)
    back = fake_quantize(there, params, group if groups > 1 else None)
    error = ((back if axis == 1 else back.transpose(1, 2)) - x).abs()
    assert bool((error <= step / 2 * (1 + 1e-9)).all())


@given(SPECS, st.lists(NUMBERS, min_size=1, max_size=30))
def test_zero_is_on_every_grid_and_every_code_is_in_range(spec: QuantSpec, values: list[float]) -> None:
    params = params_from_range(*bounds(values), spec, None)
    qmin, qmax = qrange(spec)
    x = torch.tensor([0.0, -torch.inf, torch.inf, *values])
    codes = quantize(x, params.scale, params.zero_point, None, 0, qmin, qmax)
    assert fake_quantize(torch.zeros(1), params).item() == 0
    assert qmin <= codes.min()
    assert codes.max() <= qmax
    assert qmin <= params.zero_point.item() <= qmax
    assert codes.dtype == (torch.uint8 if spec.grid == "affine" else torch.int8)


@given(SPECS, st.lists(NUMBERS, min_size=2, max_size=30))
def test_codes_keep_the_order_of_the_numbers(spec: QuantSpec, values: list[float]) -> None:
    params = params_from_range(*bounds(values), spec, None)
    codes = quantize(
        torch.tensor(sorted(values)), params.scale, params.zero_point, None, 0, params.qmin, params.qmax
    )
    assert (codes.int().diff() >= 0).all()


@given(SPECS, st.lists(NUMBERS, min_size=1, max_size=30))
def test_quantizing_twice_changes_nothing_more(spec: QuantSpec, values: list[float]) -> None:
    params = params_from_range(*bounds(values), spec, None)
    once = fake_quantize(torch.tensor(values), params)
    assert torch.equal(fake_quantize(once, params), once)


def test_grids_have_the_codes_of_their_bits() -> None:
    assert [qrange(QuantSpec(b, "affine")) for b in (2, 8)] == [(0, 3), (0, 255)]
    assert [qrange(QuantSpec(b, "symmetric")) for b in (2, 8)] == [(-2, 1), (-128, 127)]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(
    ("low", "high"),
    [
        (0.0, 0.0),
        (5.0, 5.0),
        (-5.0, -5.0),
        (0.0, 1e-45),
        (-1e-45, 0.0),
        (-1e38, 1e38),
        (-1e-38, 1e38),
        (2.0, 3.0),
    ],
)
def test_parameters_of_odd_ranges_are_finite_normal_and_cover_them(
    low: float, high: float, grid: str
) -> None:
    for bits in (2, 4, 8):
        spec = QuantSpec(bits, grid)
        params = params_from_range(torch.tensor([[low]]), torch.tensor([[high]]), spec, None)
        scale, zero_point = params.scale.item(), params.zero_point.item()
        assert torch.finfo(torch.float32).tiny <= scale < torch.inf
        assert (params.qmax - zero_point + 0.5) * scale >= high * (1 - 1e-6)
        assert (params.qmin - zero_point - 0.5) * scale <= low * (1 - 1e-6)
        assert fake_quantize(torch.tensor([low, high]), params).isfinite().all()


def test_a_range_off_zero_is_stretched_to_reach_it() -> None:
    params = params_from_range(torch.tensor([[2.0]]), torch.tensor([[3.0]]), QuantSpec(2), None)
    assert (params.scale.item(), params.zero_point.item()) == (1.0, 0)
    params = params_from_range(torch.tensor([[-3.0]]), torch.tensor([[-2.0]]), QuantSpec(2), None)
    assert (params.scale.item(), params.zero_point.item()) == (1.0, 3)


def test_a_symmetric_grid_uses_its_extra_negative_code() -> None:
    params = params_from_range(torch.tensor([[-8.0]]), torch.tensor([[7.0]]), QuantSpec(4, "symmetric"), None)
    assert (params.scale.item(), params.zero_point.item()) == (1.0, 0)


@pytest.mark.parametrize(
    ("low", "high"),
    [([0.0, float("nan")], [1.0, 1.0]), ([0.0, 0.0], [1.0, float("inf")]), ([0.0, 2.0], [1.0, 1.0])],
)
def test_a_range_that_is_not_finite_or_upside_down_names_its_channel(
    low: list[float], high: list[float]
) -> None:
    with pytest.raises(CalibrationError, match=r"channel 1 is \["):
        params_from_range(torch.tensor([low]), torch.tensor([high]), QuantSpec(8), 1)


def test_a_bad_range_names_its_timestep_group() -> None:
    low = torch.tensor([[0.0], [-torch.inf]])
    with pytest.raises(CalibrationError, match="channel 0 of timestep group 1"):
        params_from_range(low, torch.ones(2, 1), QuantSpec(8, boundaries=(500.0,)), 1)


def test_groups_of_range_and_spec_must_agree() -> None:
    with pytest.raises(ValueError, match=r"should both be \[2, C\]"):
        params_from_range(torch.zeros(1, 3), torch.ones(1, 3), QuantSpec(8, boundaries=(500.0,)), 1)


def test_per_tensor_parameters_cover_every_channel() -> None:
    low, high = torch.tensor([[-1.0, -4.0]]), torch.tensor([[3.0, 0.0]])
    whole = params_from_range(low, high, QuantSpec(3), 1)
    each = params_from_range(low, high, QuantSpec(3, per="channel"), 1)
    assert (whole.scale.tolist(), whole.zero_point.tolist(), whole.axis) == ([[1.0]], [[4]], None)
    assert (each.scale.shape, each.zero_point.tolist(), each.axis) == ((1, 2), [[2, 7]], 1)


def test_float64_ranges_give_float64_parameters_and_half_ranges_float32() -> None:
    for given_dtype, kept in ((torch.float64, torch.float64), (torch.float16, torch.float32)):
        low, high = torch.full((1, 1), -1.0, dtype=given_dtype), torch.ones(1, 1, dtype=given_dtype)
        params = params_from_range(low, high, QuantSpec(8), None)
        assert (params.scale.dtype, params.zero_point.dtype) == (kept, torch.int32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_arithmetic_is_done_in_the_dtype_of_the_scale(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 4).to(dtype)
    scale, zero_point = torch.tensor([[0.01]]), torch.tensor([[128]], dtype=torch.int32)
    codes = quantize(x, scale, zero_point, None, 0, 0, 255)
    assert torch.equal(codes, quantize(x.float(), scale, zero_point, None, 0, 0, 255))
    assert dequantize(codes, scale, zero_point).dtype == torch.float32


def test_every_sample_is_quantized_with_the_parameters_of_its_group() -> None:
    scale = torch.tensor([[1.0], [2.0], [4.0]])
    zero_point = torch.tensor([[0], [1], [2]], dtype=torch.int32)
    group = torch.tensor([2, 0, 1, 2])
    x = torch.full((4, 3), 8.0)
    codes = quantize(x, scale, zero_point, group, -1, 0, 255)
    assert codes[:, 0].tolist() == [4, 8, 5, 4]
    assert torch.equal(dequantize(codes, scale, zero_point, group, -1), x)


@pytest.mark.parametrize("axis", [1, -1, 2, -2])
def test_channels_may_lie_on_any_axis_but_the_grouped_one(axis: int) -> None:
    x, group = torch.randn(2, 5, 5), torch.tensor([1, 0])
    scale = torch.rand(2, 5) + 0.01
    zero_point = torch.tensor([[3], [4]], dtype=torch.int32)
    codes = quantize(x, scale, zero_point, group, axis, 0, 15)
    moved = codes.movedim(axis, 1)
    for sample, row in enumerate(group.tolist()):
        for channel in range(5):
            real = x.movedim(axis, 1)[sample, channel]
            expected = (real / scale[row, channel]).round() + zero_point[row]
            assert torch.equal(moved[sample, channel].float(), expected.clamp(0, 15))


def test_groups_and_channels_cannot_share_a_dimension() -> None:
    with pytest.raises(ValueError, match="axis 0"):
        quantize(torch.ones(2, 2), torch.ones(2, 2), torch.zeros(2, 2), torch.tensor([0, 1]), 0, 0, 255)


def test_parameters_of_several_groups_need_an_index() -> None:
    with pytest.raises(ValueError, match="2 timestep groups need a group index"):
        quantize(torch.ones(2, 2), torch.ones(2, 1), torch.zeros(2, 1), None, 0, 0, 255)


def test_quantizing_leaves_its_input_alone_and_keeps_its_layout() -> None:
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    before = x.clone()
    codes = quantize(x, torch.ones(1, 1), torch.zeros(1, 1), None, 1, -8, 7)
    assert torch.equal(x, before)
    assert codes.is_contiguous(memory_format=torch.channels_last)
    assert dequantize(codes, torch.ones(1, 1), torch.zeros(1, 1)).stride() == x.stride()


def test_an_empty_batch_stays_empty() -> None:
    scale, zero_point, group = torch.ones(2, 1), torch.zeros(2, 1), torch.zeros(0, dtype=torch.int64)
    assert quantize(torch.empty(0, 3), scale, zero_point, group, -1, 0, 255).shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_shift_multiplies_the_step_of_its_channel_by_a_power_of_two_exactly(dtype: torch.dtype) -> None:
    codes = torch.randint(256, (2, 3, 4), dtype=torch.uint8)
    scale, zero_point = torch.rand(2, 1, dtype=dtype), torch.tensor([[7], [200]], dtype=torch.int32)
    shift, group = torch.tensor([[0, 1, 7], [3, 0, 2]], dtype=torch.uint8), torch.tensor([1, 0])
    found = dequantize(codes, scale, zero_point, group, 1, shift)
    for row, g in enumerate(group.tolist()):
        for channel in range(3):
            step = scale[g] * 2 ** int(shift[g, channel])
            assert torch.equal(found[row, channel], (codes[row, channel].to(dtype) - zero_point[g]) * step)
    assert torch.equal(
        dequantize(codes, scale, zero_point, group, 1, shift * 0),
        dequantize(codes, scale, zero_point, group, 1),
    )
