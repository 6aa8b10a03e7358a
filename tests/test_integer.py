"""The integer layers equal a brute-force int64 computation bit for bit, at every extreme."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dmqfx.runtime.integer import conv2d, conv2d_accumulators, linear, linear_accumulators

CODES = {True: (-128, 127), False: (0, 255)}


def brute_conv2d(
    x: Tensor, w: Tensor, stride: list[int], padding: list[int], dilation: list[int], groups: int
) -> np.ndarray:
    """int64 convolution by its definition; x and w are already centered."""
    image = np.pad(x.long().numpy(), [(0, 0), (0, 0), *((p, p) for p in padding)])
    kernel = w.long().numpy()
    out_channels, depth, taps_h, taps_w = kernel.shape
    high, wide = (
        (image.shape[2 + k] - dilation[k] * (kernel.shape[2 + k] - 1) - 1) // stride[k] + 1 for k in (0, 1)
    )
    out = np.zeros((image.shape[0], out_channels, high, wide), dtype=np.int64)
    per_group = out_channels // groups
    for o, row, column in itertools.product(range(out_channels), range(high), range(wide)):
        first = o // per_group * depth
        top, left = row * stride[0], column * stride[1]
        window = image[
            :,
            first : first + depth,
            top : top + dilation[0] * (taps_h - 1) + 1 : dilation[0],
            left : left + dilation[1] * (taps_w - 1) + 1 : dilation[1],
        ]
        out[:, o, row, column] = (window * kernel[o]).sum((1, 2, 3))
    return out


def draw_codes(generator: torch.Generator, shape: list[int], signed: bool, extreme: bool) -> Tensor:
    """Random codes, or only the two outermost ones."""
    low, high = CODES[signed]
    codes = torch.randint(low, high + 1, shape, generator=generator)
    if extreme:
        codes = torch.where(codes > (low + high) // 2, high, low)
    return codes.to(torch.int8 if signed else torch.uint8)


@given(data=st.data())
def test_convolution_equals_brute_force(data: st.DataObject) -> None:
    pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
    stride, dilation, taps = (list(data.draw(pair)) for _ in range(3))
    padding = list(data.draw(st.tuples(st.integers(0, 2), st.integers(0, 2))))
    groups, depth, per_group = (data.draw(st.integers(1, 3)) for _ in range(3))
    x_signed, w_signed, extreme, mixed, per_channel, shifted = (data.draw(st.booleans()) for _ in range(6))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    size = [
        max(1, d * (t - 1) + 1 - 2 * p) + data.draw(st.integers(0, 4))
        for d, t, p in zip(dilation, taps, padding, strict=True)
    ]
    batch, rows = data.draw(st.integers(0, 3)), 4 if mixed else 1
    x = draw_codes(generator, [batch, groups * depth, *size], x_signed, extreme)
    w = draw_codes(generator, [groups * per_group, depth, *taps], w_signed, extreme)
    x_zero = draw_codes(generator, [rows, 1], x_signed, extreme).int()
    w_zero = draw_codes(generator, [1, groups * per_group if per_channel else 1], w_signed, extreme).int()
    group = torch.randint(rows, (batch,), generator=generator) if mixed else None
    shift = torch.randint(8, (rows, groups * depth), generator=generator).byte() if shifted else None
    found = conv2d_accumulators(x, x_zero, group, w, w_zero, stride, padding, dilation, groups, shift)
    zero = x_zero[group] if group is not None else x_zero
    centered = x.long() - zero.reshape(-1, 1, 1, 1), w.long() - w_zero.reshape(-1, 1, 1, 1)
    if shift is not None:
        bits = (shift[group] if group is not None else shift).long()
        centered = centered[0] << bits[:, :, None, None], centered[1]
    assert found.dtype == torch.int32
    assert np.array_equal(found.numpy(), brute_conv2d(*centered, stride, padding, dilation, groups))


@given(data=st.data())
def test_linear_layer_equals_brute_force(data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    x_signed, w_signed, extreme, shifted = (data.draw(st.booleans()) for _ in range(4))
    lead = data.draw(st.sampled_from([[0], [1], [3], [2, 5], [2, 2, 3]]))
    depth, rows = data.draw(st.sampled_from([1, 7, 64, 700])), data.draw(st.integers(1, 4))
    x = draw_codes(generator, [*lead, depth], x_signed, extreme)
    w = draw_codes(generator, [5, depth], w_signed, extreme)
    x_zero, w_zero = (
        draw_codes(generator, [3, 1], x_signed, extreme).int(),
        draw_codes(generator, [1, 5], w_signed, extreme).int(),
    )
    group = torch.randint(min(rows, 3), (lead[0],), generator=generator)
    shift = torch.randint(8 if shifted else 1, (3, depth), generator=generator).byte()
    found = linear_accumulators(x, x_zero, group, w, w_zero, shift if shifted else None)
    zero = x_zero[group].reshape([lead[0]] + [1] * len(lead))
    bits = shift[group].long().reshape([lead[0]] + [1] * (len(lead) - 1) + [depth])
    assert torch.equal(found.long(), ((x.long() - zero) << bits) @ (w.long() - w_zero.reshape(5, 1)).T)


@pytest.mark.parametrize("channels", [128, 129, 1000, 4000])
def test_long_sums_of_the_greatest_codes_are_exact(channels: int) -> None:
    x = torch.full((1, channels, 1, 1), 255, dtype=torch.uint8)
    w = torch.full((2, channels, 1, 1), -128, dtype=torch.int8)
    w[1] = 127
    w[1, 0] = 126
    zero = torch.zeros(1, 1, dtype=torch.int32)
    expected = [-128 * 255 * channels, 127 * 255 * channels - 255]
    found = conv2d_accumulators(x, zero, None, w, zero, [1, 1], [0, 0], [1, 1], 1)
    assert found.flatten().tolist() == expected
    assert linear_accumulators(x.flatten(1), zero, None, w.flatten(1), zero).flatten().tolist() == expected


def test_a_long_sum_in_groups_which_cannot_be_cut_is_exact() -> None:
    x = torch.full((1, 2000, 1, 1), 255, dtype=torch.uint8)
    x[0, 0] = 254
    w = torch.full((2, 1000, 1, 1), 127, dtype=torch.int8)
    zero = torch.zeros(1, 1, dtype=torch.int32)
    found = conv2d_accumulators(x, zero, None, w, zero, [1, 1], [0, 0], [1, 1], 2)
    assert found.flatten().tolist() == [127 * 255 * 1000 - 127, 127 * 255 * 1000]


@pytest.mark.filterwarnings("ignore:TF32")
def test_sums_are_exact_where_torch_would_convolve_by_a_transform() -> None:
    x = torch.randint(256, (32, 16, 12, 12), dtype=torch.uint8)
    w, zero = torch.randint(-128, 128, (16, 16, 3, 3), dtype=torch.int8), torch.zeros(1, 1, dtype=torch.int32)
    arguments = (x, zero + 128, None, w, zero, [1, 1], [1, 1], [1, 1], 1)
    direct = conv2d_accumulators(*arguments)
    with torch.backends.mkldnn.flags(
        enabled=False
    ):  # leaves the field to NNPACK, which is off by one here and there
        assert torch.equal(conv2d_accumulators(*arguments), direct)


def test_weights_that_could_overflow_int32_are_refused() -> None:
    w = torch.full((1, 67000), 127, dtype=torch.int8)
    x, zero = torch.zeros(1, 67000, dtype=torch.uint8), torch.zeros(1, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"\[1, 67000\].*add up to 8509000.*overflow int32"):
        linear_accumulators(x, zero, None, w, zero)
    assert linear_accumulators(x[:, :66000], zero, None, w[:, :66000], zero).item() == 0


def test_shifts_count_in_the_room_that_int32_leaves_each_input_channel_by_its_greatest() -> None:
    x, w = torch.full((1, 9000), 255, dtype=torch.uint8), torch.full((1, 9000), -120, dtype=torch.int8)
    zero, shift = torch.zeros(2, 1, dtype=torch.int32), torch.zeros(2, 9000, dtype=torch.uint8)
    group = torch.zeros(1, dtype=torch.long)
    shift[1, :100] = 7
    expected = -120 * 255 * 9000
    assert linear_accumulators(x, zero, group, w, zero[:1], shift).item() == expected
    assert (
        linear_accumulators(x, zero, group + 1, w, zero[:1], shift).item() == expected - 127 * 100 * 120 * 255
    )
    shift[1] = 3
    with pytest.raises(ValueError, match=r"shifted by the steps of the input's channels add up to 8640000"):
        linear_accumulators(x, zero, group, w, zero[:1], shift)


def test_a_shift_reaches_the_channels_of_its_own_group() -> None:
    x, w = torch.ones(1, 4, 1, 1, dtype=torch.uint8), torch.ones(2, 2, 1, 1, dtype=torch.int8)
    zero, shift = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([[0, 1, 2, 3]], dtype=torch.uint8)
    found = conv2d_accumulators(x, zero, None, w, zero, [1, 1], [0, 0], [1, 1], 2, shift)
    assert found.flatten().tolist() == [3, 12]


def test_padding_stands_for_zero_whatever_the_zero_point() -> None:
    zero_point = torch.tensor([[77]], dtype=torch.int32)
    x = torch.full((1, 1, 1, 1), 77, dtype=torch.uint8)
    w = torch.ones(1, 1, 3, 3, dtype=torch.int8)
    found = conv2d_accumulators(x, zero_point, None, w, torch.zeros(1, 1), [1, 1], [1, 1], [1, 1], 1)
    assert found.tolist() == [[[[0]]]]


def test_each_sample_is_rescaled_with_its_group_and_each_output_channel_with_its_own_scale() -> None:
    x, w = torch.tensor([[2], [2], [2]], dtype=torch.uint8), torch.tensor([[1], [3]], dtype=torch.int8)
    zero = torch.zeros(2, 1, dtype=torch.int32)
    x_scale, w_scale, bias = (
        torch.tensor([[1.0], [10.0]]),
        torch.tensor([[1.0, 100.0]]),
        torch.tensor([0.5, 0.25]),
    )
    found = linear(x, x_scale, zero, torch.tensor([0, 1, 0]), w, w_scale, zero[:1], bias)
    assert found.tolist() == [[2.5, 600.25], [20.5, 6000.25], [2.5, 600.25]]


def test_scales_per_input_channel_are_refused() -> None:
    x, w, zero = torch.zeros(1, 2, dtype=torch.uint8), torch.zeros(1, 2, dtype=torch.int8), torch.zeros(1, 1)
    with pytest.raises(ValueError, match="one input scale per timestep group"):
        linear(x, torch.ones(1, 2), zero, None, w, torch.ones(1, 1), zero, None)
    with pytest.raises(ValueError, match="one zero point per timestep group"):
        linear(x, torch.ones(1, 1), torch.zeros(1, 2), None, w, torch.ones(1, 1), zero, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_float_convolution_of_dequantized_codes_differs_only_by_rounding(dtype: torch.dtype) -> None:
    x, w = (
        torch.randint(256, (3, 4, 6, 5), dtype=torch.uint8),
        torch.randint(-8, 8, (6, 2, 3, 3), dtype=torch.int8),
    )
    x_scale, w_scale, bias = (
        torch.rand(2, 1, dtype=dtype),
        torch.rand(1, 6, dtype=dtype),
        torch.randn(6, dtype=dtype),
    )
    x_zero, w_zero = (
        torch.tensor([[7], [200]], dtype=torch.int32),
        torch.randint(-8, 8, (1, 6), dtype=torch.int32),
    )
    group = torch.tensor([1, 0, 1])
    found = conv2d(x, x_scale, x_zero, group, w, w_scale, w_zero, bias, [2, 1], [1, 0], [1, 2], 2)
    real_x = (x.to(dtype) - x_zero[group].reshape(3, 1, 1, 1)) * x_scale[group].reshape(3, 1, 1, 1)
    real_w = (w.to(dtype) - w_zero.reshape(6, 1, 1, 1)) * w_scale.reshape(6, 1, 1, 1)
    expected = torch.nn.functional.conv2d(real_x, real_w, bias, (2, 1), (1, 0), (1, 2), 2)
    assert found.dtype == dtype
    assert (found - expected).norm() <= (1e-6 if dtype == torch.float32 else 1e-14) * expected.norm()
