"""The native kernels give the bits of the plain-torch reference, on every instruction set that this machine has."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dmqfx.errors import DmqfxError
from dmqfx.numbers import quant
from dmqfx.runtime import integer
from dmqfx.runtime.attention import qattention
from dmqfx.runtime.kernels import layers, native, prepared, weights
from dmqfx.runtime.kernels.attend import WIDEST, attend
from dmqfx.runtime.kernels.coded import Coded
from dmqfx.runtime.kernels.codes import quantize
from dmqfx.runtime.kernels.native import INSTRUCTION_SETS, library
from dmqfx.runtime.operators import OPS

ZERO = torch.zeros(1, 1, dtype=torch.int32)


def here() -> tuple[str, ...]:
    """The instruction sets to compare: there must be a library where these tests run."""
    found = library()
    assert found is not None, "the kernels were not built"
    return found.instruction_sets


def draw(data: st.DataObject, shape: tuple[int, ...], low: int, high: int) -> Tensor:
    """Random codes, or only the two outermost ones, or one of them alone."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    codes = torch.randint(low, high + 1, shape, generator=generator)
    match data.draw(st.sampled_from(("any", "outermost", "least", "greatest"))):
        case "outermost":
            codes = torch.where(codes > (low + high) // 2, high, low)
        case "least":
            codes = torch.full(shape, low)
        case "greatest":
            codes = torch.full(shape, high)
    return codes.to(torch.int8 if low < 0 else torch.uint8)


def draw_input(data: st.DataObject, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, zero points [G, 1] that are codes too, and the group of each sample."""
    bits = data.draw(st.integers(4, 8))
    low, high = data.draw(st.sampled_from(((0, 2**bits - 1), (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1))))
    groups = data.draw(st.integers(1, 3))
    zero_point = draw(data, (groups, 1), low, high).int()
    group = torch.randint(groups, (shape[0],)) if groups > 1 else None
    return draw(data, shape, low, high), zero_point, group


def draw_weight(data: st.DataObject, shape: tuple[int, ...]) -> Tensor:
    bits = data.draw(st.integers(2, 8))
    return draw(data, shape, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def draw_shift(data: st.DataObject, groups: int, channels: int, most: int) -> Tensor | None:
    """No shift, or one for each timestep group and input channel, often the largest or none at all."""
    largest = data.draw(st.sampled_from((0, 1, 3, 7)))
    if largest == 0:
        return None
    largest = min(largest, most)
    shift = torch.randint(largest + 1, (groups, channels), dtype=torch.uint8)
    match data.draw(st.sampled_from(("any", "outermost", "one channel", "greatest"))):
        case "outermost":
            shift = torch.where(shift > 0, largest, 0).to(torch.uint8)
        case "one channel":
            shift = torch.zeros_like(shift)
            shift[-1, -1] = largest
        case "greatest":
            shift = torch.full_like(shift, largest)
    return shift


def relaid(data: st.DataObject, x: Tensor) -> Tensor:
    """The same numbers, laid out otherwise in memory."""
    match data.draw(st.sampled_from(("as it is", "channels last", "cut from a larger one"))):
        case "channels last":
            return x.contiguous(memory_format=torch.channels_last)
        case "cut from a larger one":
            larger = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), 1)
            larger[..., ::2] = x
            return larger[..., ::2]
    return x


@given(data=st.data())
def test_a_convolution_has_the_bits_of_the_reference(data: st.DataObject) -> None:
    pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
    stride, dilation, taps = (list(data.draw(pair)) for _ in range(3))
    padding = list(data.draw(st.tuples(st.integers(0, 2), st.integers(0, 2))))
    groups = data.draw(st.integers(1, 3))
    depth, per_group = (
        data.draw(st.sampled_from((1, 3, 4, 8, 13, 40))),
        data.draw(st.sampled_from((1, 4, 5, 16, 70))),
    )
    size = [
        max(1, d * (t - 1) + 1 - 2 * p) + data.draw(st.integers(0, 11))
        for d, t, p in zip(dilation, taps, padding, strict=True)
    ]
    batch = data.draw(st.sampled_from((0, 1, 2, 7)))
    x, zero_point, group = draw_input(data, (batch, groups * depth, *size))
    x, w = relaid(data, x), draw_weight(data, (groups * per_group, depth, *taps))
    where, shift = (stride, padding, dilation, groups), draw_shift(data, len(zero_point), groups * depth, 7)
    blob = weights.pack(w, groups)
    assert torch.equal(weights.unpack(blob, w.shape, groups), w)
    expected = integer.conv2d_accumulators(x, zero_point, group, w, ZERO, *where, shift)
    w_scale, bias = torch.rand(1, data.draw(st.sampled_from((1, len(w))))), torch.randn(len(w))
    x_scale, bias_or_none = torch.rand(len(zero_point), 1), data.draw(st.sampled_from((bias, None)))
    real = integer.conv2d(x, x_scale, zero_point, group, w, w_scale, ZERO, bias_or_none, *where, shift)
    for each in here():
        given_ = (zero_point, group, blob, w.shape, w_scale, bias_or_none, *where, each, shift)
        assert torch.equal(layers.conv2d(x, None, *given_), expected), each
        assert torch.equal(layers.conv2d(x, x_scale, *given_), real), each


@given(data=st.data())
def test_a_linear_layer_has_the_bits_of_the_reference(data: st.DataObject) -> None:
    lead = data.draw(st.sampled_from(((0,), (1,), (7,), (2, 0), (3, 1), (2, 5), (2, 2, 50))))
    depth, rows = (
        data.draw(st.sampled_from((1, 3, 64, 333, 5000))),
        data.draw(st.sampled_from((1, 16, 33, 130))),
    )
    x, zero_point, group = draw_input(data, (*lead, depth))
    w = draw_weight(data, (rows, depth))
    blob, w_scale, bias = weights.pack(w, 1), torch.rand(1, rows), torch.randn(rows)
    x_scale, shift = torch.rand(len(zero_point), 1), draw_shift(data, len(zero_point), depth, 3)
    expected = integer.linear_accumulators(x, zero_point, group, w, ZERO, shift)
    real = integer.linear(x, x_scale, zero_point, group, w, w_scale, ZERO, bias, shift)
    for each in here():
        given_ = (zero_point, group, blob, w.shape, w_scale, bias, each, shift)
        assert torch.equal(layers.linear(x, None, *given_), expected), each
        assert torch.equal(layers.linear(x, x_scale, *given_), real), each


@pytest.mark.parametrize("activation_bits", range(4, 9))
@pytest.mark.parametrize("weight_bits", range(2, 9))
@pytest.mark.parametrize("sign", [-1, 1])
def test_sums_as_long_and_large_as_they_can_be_do_not_overflow_on_the_way(
    activation_bits: int, weight_bits: int, sign: int
) -> None:
    """Every product the greatest of its format: 16 bit sums that are flushed one step too late would show."""
    depth, greatest = 4 * 1100 + 2, 2**activation_bits - 1
    code = -(2 ** (weight_bits - 1)) if sign < 0 else 2 ** (weight_bits - 1) - 1
    x = torch.full((7, depth), greatest, dtype=torch.uint8)
    w = torch.full((17, depth), code, dtype=torch.int8)
    w[3] = torch.where(torch.arange(depth) % 4 < 2, code, -code - (1 if code > 0 else 0)).clamp(-128, 127)
    expected = integer.linear_accumulators(x, ZERO, None, w, ZERO)
    assert expected[0, 0] == depth * greatest * code
    for each in here():
        found = layers.linear(x, None, ZERO, None, weights.pack(w, 1), w.shape, ZERO, None, each)
        assert torch.equal(found, expected), each


@given(
    st.integers(2, 8), st.integers(4, 8), st.sampled_from((63, 1000, 1030, 4099)), st.sampled_from((0.1, 0.5, 1.0)),
    st.integers(0, 2**31),
)  # fmt: skip
def test_codes_that_meet_only_weights_of_one_sign_go_as_far_as_the_weights_allow_and_no_further(
    weight_bits: int, activation_bits: int, depth: int, width: float, seed: int
) -> None:
    """Weights mostly far from their bounds: 16 bit sums hold more steps than of the worst ones, and here nearly end."""
    generator, greatest = torch.Generator().manual_seed(seed), 2**activation_bits - 1
    high = 2 ** (weight_bits - 1)
    w = (torch.randn(19, depth, generator=generator) * width * high / 2).round().clamp(-high, high - 1)
    x = torch.cat([w > 0, w < 0, (w > 0)[:, torch.randperm(depth, generator=generator)]]) * greatest
    x, w = x.to(torch.uint8), w.to(torch.int8)
    expected, blob = integer.linear_accumulators(x, ZERO, None, w, ZERO), weights.pack(w, 1)
    assert torch.equal(weights.unpack(blob, w.shape, 1), w)
    for each in here():
        assert torch.equal(layers.linear(x, None, ZERO, None, blob, w.shape, ZERO, None, each), expected), (
            each
        )


@given(st.integers(3, 6), st.sampled_from((18, 470)), st.integers(0, 4), st.integers(0, 2**31))
def test_the_same_holds_of_a_convolution_in_groups_with_shifts(
    bits: int, depth: int, shift: int, seed: int
) -> None:
    """Steps in the order of taps, beyond the 768 that are unpacked together; an image meets a channel's signs."""
    generator, high = torch.Generator().manual_seed(seed), 2 ** (bits - 1)
    w = (torch.randn(10, depth, 3, 3, generator=generator) * high / 3).round().clamp(-high, high - 1)
    x = torch.cat([(w > 0).view(5, 2 * depth, 3, 3), (w < 0).view(5, 2 * depth, 3, 3)]) * 63
    x, w = x.to(torch.uint8), w.to(torch.int8)
    shifts = (
        torch.randint(shift + 1, (1, 2 * depth), generator=generator, dtype=torch.uint8) if shift else None
    )
    expected = integer.conv2d_accumulators(x, ZERO, None, w, ZERO, [1, 1], [0, 0], [1, 1], 2, shifts)
    blob = weights.pack(w, 2, shifts)
    for each in here():
        given_ = (ZERO, None, blob, w.shape, ZERO, None, [1, 1], [0, 0], [1, 1], 2, each, shifts)
        assert torch.equal(layers.conv2d(x, None, *given_), expected), each


@pytest.mark.parametrize("activation_bits", [4, 6, 8])
@pytest.mark.parametrize("weight_bits", range(2, 9))
@pytest.mark.parametrize("sign", [-1, 1])
def test_shifted_sums_as_long_and_large_as_they_can_be_do_not_overflow_on_the_way(
    activation_bits: int, weight_bits: int, sign: int
) -> None:
    """Every product the greatest of its format, in three timestep groups of a batch: nothing, all, or some shifted."""
    depth, greatest = 4 * 260 + 2, 2**activation_bits - 1
    code = -(2 ** (weight_bits - 1)) if sign < 0 else 2 ** (weight_bits - 1) - 1
    x, zero_point = torch.full((7, depth), greatest, dtype=torch.uint8), torch.tensor([[0], [1], [greatest]])
    w = torch.full((17, depth), code, dtype=torch.int8)
    w[3, ::2] = 0
    shift = torch.stack([torch.zeros(depth), torch.full((depth,), 3), torch.arange(depth) % 4]).byte()
    group = torch.tensor([2, 1, 0, 1, 0, 2, 1])
    expected = integer.linear_accumulators(x, zero_point, group, w, ZERO, shift)
    packed = weights.pack(w, 1, shift)
    for each in here():
        found = layers.linear(x, None, zero_point, group, packed, w.shape, ZERO, None, each, shift)
        assert torch.equal(found, expected), each


def test_a_strip_that_is_full_has_a_row_for_the_zero_point_left() -> None:
    """Shifted layers take the zero point's share from a position more; 94 to 97 lie around the longest strip."""
    w, shift = torch.randint(-8, 8, (20, 24), dtype=torch.int8), torch.randint(4, (1, 24), dtype=torch.uint8)
    for rows in (94, 95, 96, 97, 190, 191):
        x = torch.randint(256, (rows, 24), dtype=torch.uint8)
        expected = integer.linear_accumulators(x, ZERO + 77, None, w, ZERO, shift)
        for each in here():
            given_ = (ZERO + 77, None, weights.pack(w, 1), w.shape, ZERO, None, each, shift)
            assert torch.equal(layers.linear(x, None, *given_), expected), each


def test_padding_counts_in_the_room_of_16_bit_sums() -> None:
    """The codes are small and the zero point is not: a bound on the codes alone would be too generous."""
    x, zero_point = torch.zeros(1, 64, 1, 1, dtype=torch.uint8), torch.full((1, 1), 255, dtype=torch.int32)
    w = torch.full((16, 64, 3, 3), -8, dtype=torch.int8)
    where = ([1, 1], [1, 1], [1, 1], 1)
    expected = integer.conv2d_accumulators(x, zero_point, None, w, ZERO, *where)
    for each in here():
        found = layers.conv2d(
            x, None, zero_point, None, weights.pack(w, 1), w.shape, ZERO, None, *where, each
        )
        assert torch.equal(found, expected), each


@pytest.mark.parametrize("heavy", [0, 1])
def test_blocks_that_are_summed_together_have_runs_that_suit_each(heavy: int) -> None:
    """30 heavy steps of one block lie half in one run of 128 steps; runs of the other's 51 would hold them all."""
    w = torch.zeros(32, 1024, dtype=torch.int8)
    w[16 * heavy : 16 * heavy + 16, 452:572] = -8
    w[16 * (1 - heavy) : 16 * (1 - heavy) + 16, 0::2] = 3
    w[16 * (1 - heavy) : 16 * (1 - heavy) + 16, 1::2] = 2
    x = torch.zeros(8, 1024, dtype=torch.uint8)
    x[1:] = 255
    expected = integer.linear_accumulators(x, ZERO, None, w, ZERO)
    grid = Coded(torch.ones(1, 1), ZERO, 0, 255, "geglu")
    for each in here():
        head = (ZERO, None, weights.pack(w, 1), w.shape)
        assert torch.equal(layers.linear(x, None, *head, ZERO, None, each), expected), each
        gated = layers.linear(x, torch.ones(1, 1), *head, torch.full((1, 1), 1e-4), None, each, coded=grid)
        assert torch.equal(gated, grid.of(expected * 1e-4, None, 1)), each


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("strong", range(6))
def test_each_block_has_the_room_of_its_own_weights(strong: int, groups: int) -> None:
    """One block of 16 channels holds far fewer steps in 16 bits than the others; the codes are the worst."""
    w = torch.ones(96, 512, 1, 1, dtype=torch.int8)
    w[16 * strong : 16 * (strong + 1)] = -8
    x = torch.zeros(1, 512 * groups, 2, 4, dtype=torch.uint8)
    x[..., 1:] = 255
    where = ([1, 1], [0, 0], [1, 1], groups)
    expected = integer.conv2d_accumulators(x, ZERO, None, w, ZERO, *where)
    for each in here():
        found = layers.conv2d(x, None, ZERO, None, weights.pack(w, groups), w.shape, ZERO, None, *where, each)
        assert torch.equal(found, expected), each


@pytest.mark.parametrize(
    ("codes", "groups"),
    [
        (torch.ones(4, 8), 1),
        (torch.ones(4, 8, dtype=torch.int64), 1),
        (torch.ones(5, 8, dtype=torch.int8), 2),
        (torch.ones(4, 8, dtype=torch.int8), 0),
        (torch.ones(4, 4, 3, dtype=torch.int8), 1),
    ],
)
def test_what_is_no_weight_is_not_packed(codes: Tensor, groups: int) -> None:
    with pytest.raises(ValueError, match="are not the codes of a weight"):
        weights.pack(codes, groups)


def test_a_sum_that_could_leave_int32_is_refused_when_weights_are_packed() -> None:
    with pytest.raises(ValueError, match="could overflow int32"):
        weights.pack(torch.full((1, 67000), 127, dtype=torch.int8), 1)
    few = torch.full((1, 66000), 127, dtype=torch.int8)
    assert weights.pack(few, 1).numel() > 66000
    shift = torch.zeros(2, 66000, dtype=torch.uint8)
    assert weights.pack(few, 1, shift).numel() > 66000
    shift[1, :400] = 3
    with pytest.raises(ValueError, match=r"shifted by the steps .* could overflow int32"):
        weights.pack(few, 1, shift)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("count", [1, 2, 3, 16])
def test_the_number_of_threads_changes_nothing(count: int) -> None:
    x = torch.randint(256, (2, 20, 31, 17), dtype=torch.uint8)
    small = x[:1, :, :1, :1]
    w = torch.randint(-8, 8, (70, 20, 3, 3), dtype=torch.int8)
    where = ([2, 1], [1, 1], [1, 1], 1)
    for each in (x, small):
        expected = integer.conv2d_accumulators(each, ZERO + 9, None, w, ZERO, *where)
        with threads(count):
            for name in here():
                found = layers.conv2d(
                    each, None, ZERO + 9, None, weights.pack(w, 1), w.shape, ZERO, None, *where, name
                )
                assert torch.equal(found, expected), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shifted", [False, True])
def test_the_operators_have_the_bits_of_the_reference_operators(dtype: torch.dtype, shifted: bool) -> None:
    x, group = torch.randint(256, (3, 8, 5, 6), dtype=torch.uint8), torch.tensor([1, 0, 1])
    w, bias = torch.randint(-128, 128, (6, 4, 3, 3), dtype=torch.int8), torch.randn(6, dtype=dtype)
    x_scale, w_scale = torch.rand(2, 1, dtype=dtype), torch.rand(1, 6, dtype=dtype)
    zero_point = torch.tensor([[3], [250]], dtype=torch.int32)
    shift = torch.randint(4, (2, 8), dtype=torch.uint8) if shifted else None
    head, tail = (x, x_scale, zero_point, group), ([1, 2], [1, 0], [1, 1], 2, shift)
    expected = OPS.qconv2d(
        *head, w.flatten().view(torch.uint8), 8, True, list(w.shape), w_scale, ZERO, bias, *tail
    )
    found = OPS.kernel_conv2d(*head, weights.pack(w, 2), 8, list(w.shape), w_scale, bias, *tail)
    assert found.dtype == dtype
    assert torch.equal(found, expected)
    assert found.stride() == expected.stride()


def draw_added(data: st.DataObject, shape: tuple[int, ...]) -> Tensor:
    """What may be added to a result: all of it, a number of each channel and sample, or what broadcasts otherwise."""
    sizes = {
        "all": shape,
        "channels last": shape,
        "of samples": (shape[0], shape[1], *[1] * (len(shape) - 2)),
        "of channels": (1, shape[1], *[1] * (len(shape) - 2)),
        "of positions": (1, 1, *shape[2:]),
        "one number": (),
    }
    kind = data.draw(st.sampled_from(list(sizes)))
    added = torch.randn(sizes[kind])
    return added.contiguous(memory_format=torch.channels_last) if kind == "channels last" else added


@given(data=st.data())
def test_what_is_added_is_added_to_the_bits_of_the_layer(data: st.DataObject) -> None:
    batch, high, wide = data.draw(
        st.tuples(*[st.sampled_from(each) for each in ((0, 1, 3), (1, 9), (1, 12))])
    )
    x, zero_point, group = draw_input(data, (batch, 8, high, wide))
    w, w_scale, x_scale = draw_weight(data, (70, 8, 1, 1)), torch.rand(1, 70), torch.rand(len(zero_point), 1)
    bias = data.draw(st.sampled_from((torch.randn(70), None)))
    added = draw_added(data, (batch, 70, high, wide))
    head = (zero_point, group, weights.pack(w, 1), w.shape, w_scale, bias)
    for each in here():
        alone = layers.conv2d(x, x_scale, *head, instruction_set=each)
        found = layers.conv2d(x, x_scale, *head, instruction_set=each, added=added)
        assert torch.equal(found, alone + added), each
        assert found.is_contiguous(memory_format=torch.channels_last)
        rows = (
            x.permute(0, 2, 3, 1),
            x_scale,
            *head[:2],
            weights.pack(w[:, :, 0, 0], 1),
            [70, 8],
            w_scale,
            bias,
        )
        more = added.permute(0, 2, 3, 1) if added.dim() else added
        assert torch.equal(layers.linear(*rows, each, added=more), found.permute(0, 2, 3, 1)), each


@pytest.mark.parametrize("activation", ["none", "silu", "gelu", "geglu"])
@pytest.mark.parametrize("rows", [32, 160, 70, 56, 48])
@given(data=st.data())
def test_results_that_become_codes_have_the_codes_of_quantize(
    activation: str, rows: int, data: st.DataObject
) -> None:
    """Wide and narrow grids and parts, signed and unsigned, with shifts, something added and nothing; rows and images."""
    deep = data.draw(st.sampled_from((8, 8, 1032)))  # the last makes parts of one block
    batch, high, wide = data.draw(
        st.tuples(*[st.sampled_from(each) for each in ((0, 1, 3), (1, 9), (1, 12))])
    )
    x, zero_point, group = draw_input(data, (batch, deep, high, wide))
    w, groups = draw_weight(data, (rows, deep, 1, 1)), len(zero_point)
    shift, added = draw_shift(data, groups, deep, 3), data.draw(st.sampled_from((torch.randn(rows), None)))
    scales, bias = (torch.rand(groups, 1) * 0.1, torch.rand(1, rows)), torch.randn(rows)
    low = data.draw(st.sampled_from((0, -128)))
    columns = data.draw(st.sampled_from((1, rows // 2 if activation == "geglu" else rows)))
    grid = torch.rand(groups, columns) + 0.01, torch.randint(low, low + 256, (groups, columns)).int()
    coded = Coded(*grid, low, low + 255, activation)
    head = (scales[0], zero_point, group, weights.pack(w, 1))
    for each in here():
        flat = (x.permute(0, 2, 3, 1), *head, [rows, deep], scales[1], bias, each, shift, added)
        found, real = layers.linear(*flat, coded), layers.linear(*flat)
        expected = quantize(
            real, *grid, group, 3, low, low + 255, activation=activation, instruction_set=each
        )
        assert torch.equal(found, expected), each
        assert found.dtype == expected.dtype
        if activation != "geglu":
            more = None if added is None else added[:, None, None]
            image = layers.conv2d(
                x, *head, w.shape, scales[1], bias, instruction_set=each, shift=shift, added=more, coded=coded
            )
            assert torch.equal(image.permute(0, 2, 3, 1), expected), each


@pytest.mark.parametrize(
    ("depth", "out", "size"),
    [(3, 24, 9), (16, 24, 7), (4, 24, 90), (17, 24, 9), (17, 4, 9), (40, 3, 7), (20, 1, 200)],
)
def test_few_channels_under_several_taps_are_read_as_many_are(depth: int, out: int, size: int) -> None:
    """Of the input, they are copied side by side first, by several threads where there are many; of the output, folded."""
    x, groups = torch.randint(-128, 128, (3, depth, size, size + 2), dtype=torch.int8), 3
    zero_point, group = torch.randint(-128, 128, (groups, 1), dtype=torch.int32), torch.tensor([2, 0, 1])
    w, w_scale, x_scale = (
        torch.randint(-8, 8, (out, depth, 3, 3), dtype=torch.int8),
        torch.rand(1, out),
        torch.rand(groups, 1),
    )
    where, grid = (
        ([2, 1], [1, 2], [1, 2], 1),
        (torch.rand(groups, out) + 0.1, torch.randint(256, (groups, out)).int()),
    )
    plain = integer.conv2d(x, x_scale, zero_point, group, w, w_scale, ZERO, None, *where, None)
    for added in (None, torch.randn(3, out, 1, 1), torch.randn(plain.shape)):
        expected = plain if added is None else plain + added
        for each in here():
            given_ = (x, x_scale, zero_point, group, weights.pack(w, 1), w.shape, w_scale, None, *where, each)
            assert torch.equal(layers.conv2d(*given_, added=added), expected), each
            found = layers.conv2d(*given_, added=added, coded=Coded(*grid, 0, 255))
            assert torch.equal(found, quantize(expected, *grid, group, 1, 0, 255, instruction_set=each)), each


def test_large_images_of_few_output_channels_are_worked_on_in_turns() -> None:
    x = torch.randint(256, (3, 20, 700, 500), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    w = torch.randint(-8, 8, (4, 20, 3, 3), dtype=torch.int8)
    zero_point, group = torch.tensor([[3], [200]], dtype=torch.int32), torch.tensor([1, 0, 1])
    tail = (weights.pack(w, 1), w.shape, ZERO, None, [1, 1], [1, 1], [1, 1], 1)
    found = layers.conv2d(x, None, zero_point, group, *tail)
    for k in range(3):
        assert torch.equal(
            found[k : k + 1], layers.conv2d(x[k : k + 1], None, zero_point, group[k : k + 1], *tail)
        )


@given(data=st.data())
def test_upsampled_codes_are_read_where_torch_reads_them(data: st.DataObject) -> None:
    high, wide = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    depth = data.draw(st.sampled_from((5, 20)))
    x, zero_point, group = draw_input(data, (2, depth, high, wide))
    w, where = draw_weight(data, (4, depth, 3, 3)), ([data.draw(st.integers(1, 2))] * 2, [1, 1], [1, 1], 1)
    size = data.draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
    factors = data.draw(st.tuples(*[st.sampled_from((1.0, 2.0, 3.0))] * 2))
    blob, scales = weights.pack(w, 1), (torch.rand(len(zero_point), 1), torch.rand(1, 4))
    for given_ in ((size, None), (None, factors)):
        larger = torch.ops.aten.upsample_nearest2d.vec(x.float(), *given_).to(x.dtype)
        head = (zero_point, group, blob, w.shape, scales[1], None, *where)
        expected = layers.conv2d(larger, scales[0], *head)
        for each in here():
            assert torch.equal(layers.conv2d(x, scales[0], *head, each, None, None, *given_), expected), each


def test_what_is_found_once_follows_every_change() -> None:
    x = torch.randint(256, (2, 8, 5, 5), dtype=torch.uint8)  # signed further down
    w, group = torch.randint(-8, 8, (6, 8, 3, 3), dtype=torch.int8), torch.tensor([1, 0])
    tensors = {
        "x_scale": torch.rand(2, 1), "x_zero_point": torch.tensor([[3], [200]]), "group": group,
        "blob": weights.pack(w, 1), "w_scale": torch.rand(1, 6), "bias": torch.randn(6),
        "shift": torch.randint(4, (2, 8), dtype=torch.uint8),
    }  # fmt: skip

    def agree() -> Tensor:
        found = layers.conv2d(x, weight_shape=w.shape, **tensors)
        fresh = {name: each.clone() for name, each in tensors.items()}
        assert torch.equal(found, layers.conv2d(x, weight_shape=w.shape, **fresh))
        return found

    before = agree()
    for name in ("x_scale", "x_zero_point", "w_scale", "bias", "shift"):
        tensors[name].add_(1)
        changed = agree()
        assert not torch.equal(before, changed), name
        tensors[name] = tensors[name].clone()
        tensors[name].add_(1)
        before = agree()
        assert not torch.equal(before, changed), name
    tensors["blob"].copy_(weights.pack(-w.clamp(min=-7), 1))
    assert not torch.equal(before, agree())
    before, x = agree(), (x.int() - 128).to(torch.int8)
    tensors["x_zero_point"] = tensors["x_zero_point"] - 128
    assert torch.equal(before, agree())
    for name in tensors:
        tensors[name].share_memory_()
        assert torch.equal(before, agree()), name
        tensors[name].data = tensors[name].clone()
        assert torch.equal(before, agree()), name
    with torch.inference_mode():
        tensors = {name: each.clone() for name, each in tensors.items()}
        for name in ("x_scale", "bias"):
            before = agree()
            tensors[name].mul_(2)
            assert not torch.equal(before, agree())


def test_what_is_found_once_goes_with_the_weights() -> None:
    x, blobs = torch.randint(256, (2, 20), dtype=torch.uint8), [blob() for _ in range(3)]
    known = len(prepared._KNOWN)
    for each in blobs:
        layers.linear(x, None, ZERO, None, each, (4, 20), ZERO, None)
    assert len(prepared._KNOWN) == known + 3
    del each, blobs
    assert len(prepared._KNOWN) == known


# --- what is refused


def blob() -> Tensor:
    return weights.pack(torch.arange(-8, 8, dtype=torch.int8).repeat(5).reshape(4, 20), 1)


def spoiled(at: int, value: int) -> Tensor:
    changed = blob()
    changed[at] = value
    return changed


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (blob()[:-1].clone(), r"it has \d+ bytes where the layer \[4, 20\] needs \d+"),
        (torch.cat([blob(), blob()]), r"it has \d+ bytes"),
        (blob()[:8].clone(), "does not start with the header"),
        (blob().view(torch.int8), "does not start with the header"),
        (spoiled(0, 0), "does not start with the header"),
        (spoiled(4, 99), "does not start with the header of version 6"),
        (spoiled(8, 0), r"it has \d+ bytes"),
        (spoiled(12, 2), "where the layer has"),
        (spoiled(33, 77), "where the layer has"),
        (spoiled(32, 8), "where the layer has"),
        (spoiled(39, 1), "no codes have runs within"),
        (spoiled(80, 0), "no codes have runs within"),
        (spoiled(147, 1), "no codes have runs within"),
    ],
)
def test_malformed_weights_are_refused_before_the_kernel_sees_them(wrong: Tensor, told: str) -> None:
    x = torch.zeros(2, 20, dtype=torch.uint8)
    with pytest.raises(DmqfxError, match=told):
        layers.linear(x, None, ZERO, None, wrong, (4, 20), ZERO, None)


@pytest.mark.parametrize(
    ("at", "value"),
    [(32, 3), (36, 14), (64, 200), (76, 200), (144, 0x77), (-1, 0x10), (148, 0x77), (192, 0x77)],
)
def test_numbers_that_do_not_follow_from_the_codes_are_found(at: int, value: int) -> None:
    assert torch.equal(
        weights.unpack(blob(), (4, 20), 1).flatten(), torch.arange(-8, 8, dtype=torch.int8).repeat(5)
    )
    with pytest.raises(DmqfxError, match="malformed weights"):
        weights.unpack(spoiled(at, value), (4, 20), 1)


def test_sizes_that_do_not_fit_are_refused_by_name() -> None:
    w = torch.ones(4, 8, 3, 3, dtype=torch.int8)
    packed, x = weights.pack(w, 1), torch.zeros(1, 8, 2, 2, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"2 x 2, padded by \[0, 0\], is smaller than the kernel"):
        layers.conv2d(x, None, ZERO, None, packed, w.shape, ZERO, None)
    with pytest.raises(ValueError, match="7 input channels"):
        layers.conv2d(x[:, :7], None, ZERO, None, packed, w.shape, ZERO, None)
    with pytest.raises(ValueError, match="19 input channels"):
        layers.linear(torch.zeros(2, 19, dtype=torch.uint8), None, ZERO, None, blob(), (4, 20), ZERO, None)
    with pytest.raises(ValueError, match="a zero point of the input is not one of its codes"):
        layers.conv2d(x, None, ZERO + 256, None, packed, w.shape, ZERO, None, padding=(1, 1))
    with pytest.raises(ValueError, match="not one per input channel"):
        layers.conv2d(x, None, ZERO.repeat(1, 8), None, packed, w.shape, ZERO, None, padding=(1, 1))
    with pytest.raises(ValueError, match="2 timestep groups need a group index"):
        layers.conv2d(x, None, ZERO.repeat(2, 1), None, packed, w.shape, ZERO, None, padding=(1, 1))
    two, one = ZERO.repeat(2, 1), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="a timestep group beyond the 2"):
        layers.conv2d(x, None, two, one + 2, packed, w.shape, ZERO, None, padding=(1, 1))
    with pytest.raises(ValueError, match="a timestep group beyond the 2"):
        layers.conv2d(x, None, two, one - 1, packed, w.shape, ZERO, None, padding=(1, 1))
    with pytest.raises(ValueError, match="3 timestep groups for 1 samples"):
        layers.conv2d(x, None, two, one.repeat(3), packed, w.shape, ZERO, None, padding=(1, 1))
    with pytest.raises(ValueError, match=r"3 timestep groups for codes \[2, 20\]"):
        layers.linear(
            torch.zeros(2, 20, dtype=torch.uint8), None, two, one.repeat(3), blob(), (4, 20), ZERO, None
        )
    x = torch.zeros(4, 3, 20, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"2 timestep groups for codes \[4, 3, 20\]"):
        layers.linear(x, None, two, one.repeat(2), blob(), (4, 20), ZERO, None)
    with pytest.raises(ValueError, match=r"codes are int8 or uint8, not torch\.int64"):
        layers.linear(x.long(), None, ZERO, None, blob(), (4, 20), ZERO, None)


def test_grids_of_results_that_do_not_fit_are_refused_by_name() -> None:
    scale, x = torch.ones(1, 1), torch.zeros(2, 20, dtype=torch.uint8)
    head = (x, scale, ZERO, None, blob(), (4, 20), scale, None, None, None, None)
    with pytest.raises(ValueError, match="3 rows of scales, 1 of zero points"):
        layers.linear(*head, Coded(torch.ones(3, 1), ZERO, 0, 255))
    with pytest.raises(ValueError, match=r"scale \[1, 5\], zero point \[1, 1\] for 4 channels"):
        layers.linear(*head, Coded(torch.ones(1, 5), ZERO, 0, 255))
    image, w = torch.zeros(2, 20, 1, 1, dtype=torch.uint8), torch.ones(32, 20, 1, 1, dtype=torch.int8)
    coded = Coded(scale, ZERO, 0, 255, "geglu")
    with pytest.raises(ValueError, match="geglu is of rows"):
        layers.conv2d(image, scale, ZERO, None, weights.pack(w, 1), w.shape, scale, None, coded=coded)


def test_of_no_input_channels_results_are_biases() -> None:
    x, empty = torch.zeros(4, 0, dtype=torch.uint8), weights.pack(torch.zeros(5, 0, dtype=torch.int8), 1)
    found = layers.linear(x, torch.ones(1, 1), ZERO, None, empty, (5, 0), torch.ones(1, 5), torch.arange(5.0))
    assert torch.equal(found, torch.arange(5.0).expand(4, 5))


@pytest.mark.parametrize("out", [4, 5])
def test_of_no_input_channels_or_no_image_a_convolution_gives_biases(out: int) -> None:
    bias, one = torch.arange(float(out)), torch.ones(1, 1)
    for shape, size, padding in (((out, 0, 3, 3), (0, 8, 8), [1, 1]), ((out, 32, 1, 3), (32, 0, 8), [1, 1])):
        x, blob_ = (
            torch.zeros(2, *size, dtype=torch.uint8),
            weights.pack(torch.ones(shape, dtype=torch.int8), 1),
        )
        found = layers.conv2d(x, one, ZERO, None, blob_, shape, one, bias, [1, 1], padding, [1, 1], 1)
        assert torch.equal(found, bias[:, None, None].expand_as(found))


def test_folded_weights_are_those_that_are_told_and_follow_from_their_codes() -> None:
    shape, x = (4, 20, 3, 3), torch.randint(256, (1, 20, 9, 9), dtype=torch.uint8)
    w = torch.randint(-8, 8, shape, dtype=torch.int8)
    folded, plain = weights.pack(w, 1), weights.pack(w, 1, strided=True)
    assert len(folded) < len(plain)
    assert torch.equal(weights.unpack(folded, shape, 1), weights.unpack(plain, shape, 1))
    for where in ([1, 1], [2, 2]):
        one, other = (
            layers.conv2d(x, None, ZERO, None, each, shape, ZERO, None, where, [1, 1], [1, 1], 1)
            for each in (folded, plain)
        )
        assert torch.equal(one, other)
    assert len(weights.pack(w[:, :, :1, :1], 1)) == len(weights.pack(w[:, :, :1, :1], 1, strided=True))
    for at, value, told in (
        (40, 0, "where the layer has"),
        (40, 2, "is folded"),
        (-400, 17, "do not follow"),
    ):
        wrong = folded.clone()
        wrong[at] = value if at > 0 else wrong[at] ^ value
        with pytest.raises(DmqfxError, match=told):
            weights.unpack(wrong, shape, 1)


def test_what_is_added_may_have_another_dtype() -> None:
    x, one = torch.zeros(4, 20, dtype=torch.uint8), torch.ones(1, 1)
    for dtype in (torch.float64, torch.float16, torch.int64):
        added = torch.ones(4, 4, dtype=dtype)
        assert (layers.linear(x, one, ZERO, None, blob(), (4, 20), one, None, added=added) == 1).all()


@pytest.mark.parametrize(
    ("shift", "told"),
    [
        (torch.zeros(1, 7, dtype=torch.uint8), r"a shift torch.uint8 \[1, 7\] for 8 input channels"),
        (torch.zeros(1, 8, dtype=torch.int32), "a shift torch.int32"),
        (torch.zeros(2, 8, dtype=torch.uint8), "rows for other numbers of timestep groups"),
        (torch.full((1, 8), 31, dtype=torch.uint8), "shifted by more than 30 bits"),
    ],
)
def test_shifts_that_do_not_fit_are_refused_by_name(shift: Tensor, told: str) -> None:
    w, x = torch.ones(4, 8, 3, 3, dtype=torch.int8), torch.zeros(2, 8, 3, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match=told):
        layers.conv2d(x, None, ZERO, None, weights.pack(w, 1), w.shape, ZERO, None, shift=shift)


# --- the environment


ASK = "from dmqfx.runtime.kernels.native import library; found = library(); print(found and found.chosen)"


def ask(**environment: str) -> subprocess.CompletedProcess[str]:
    given_ = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, "-c", ASK], env=given_, capture_output=True, text=True, check=False
    )


def test_the_environment_picks_the_instruction_set_and_the_best_is_the_default() -> None:
    assert here()[0] == "scalar"
    assert ask(DMQFX_ISA="").stdout.strip() == here()[-1]
    assert ask(DMQFX_ISA="scalar").stdout.strip() == "scalar"
    assert "did you mean 'avx2'" in ask(DMQFX_ISA="avx").stderr


def test_an_instruction_set_that_is_not_there_is_refused_with_those_that_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DMQFX_ISA", "avx512vnni")
    with pytest.raises(DmqfxError, match="no such kernels; there is scalar"):
        native._chosen(("scalar",))
    assert native._chosen(INSTRUCTION_SETS) == "avx512vnni"


def test_without_the_library_it_is_said_once_and_layers_run_in_plain_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    x, w = (
        torch.randint(256, (2, 8, 5, 5), dtype=torch.uint8),
        torch.randint(-8, 8, (4, 8, 3, 3)).to(torch.int8),
    )
    scales = (torch.rand(1, 1), ZERO + 7, None, weights.pack(w, 1), list(w.shape), torch.rand(1, 4), None)
    rows = (x[:, :, 0, 0], *scales[:3], weights.pack(w[:, :, 0, 0], 1), [4, 8], *scales[5:])
    shift = torch.randint(4, (1, 8), dtype=torch.uint8)
    expected = layers.conv2d(x, *scales), layers.linear(*rows), layers.conv2d(x, *scales, shift=shift)
    monkeypatch.setenv("DMQFX_KERNELS", "/nowhere.so")
    library.cache_clear()
    try:
        assert torch.equal(layers.conv2d(x, *scales), expected[0])
        assert torch.equal(layers.linear(*rows), expected[1])
        assert torch.equal(layers.conv2d(x, *scales, shift=shift), expected[2])
        assert not torch.equal(expected[2], expected[0])
        assert "a C++ compiler" in native.absent()
    finally:
        library.cache_clear()
    told = [record.getMessage() for record in caplog.records if "no native kernels" in record.getMessage()]
    assert len(told) == 1
    assert "/nowhere.so" in told[0]
    assert "mend: install a C++ compiler" in told[0]


def test_a_library_of_other_sources_is_not_taken(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native.ctypes, "sizeof", lambda kind: 8)
    library.cache_clear()
    try:
        assert library() is None
    finally:
        monkeypatch.undo()
        library.cache_clear()
    assert "was built from other sources" in caplog.text


def test_what_no_kernel_takes_is_told_once_and_computed_in_plain_torch(
    caplog: pytest.LogCaptureFixture,
) -> None:
    x, scale = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0)), torch.full((1, 1), 0.05)
    wide = torch.ones(1, 1, 2, WIDEST + 1)

    def codes(dtype: torch.dtype) -> Tensor:
        return quantize(x.to(dtype), scale.to(dtype), ZERO.to(dtype) + 128, None, 1, 0, 255)

    def plain(dtype: torch.dtype) -> Tensor:
        return quant.quantize(x.to(dtype), scale.to(dtype), ZERO.to(dtype) + 128, None, 1, 0, 255)

    native.warn_once.cache_clear()
    assert torch.equal(codes(torch.float32), plain(torch.float32))
    assert torch.equal(codes(torch.float64), plain(torch.float64))
    attend(wide[..., 1:], wide[..., 1:], wide[..., 1:])
    assert not caplog.records
    for _ in range(2):
        for dtype in (torch.bfloat16, torch.float16):
            assert torch.equal(codes(dtype), plain(dtype))
        assert torch.equal(attend(wide, wide, wide), qattention(wide, wide, wide))
    takes = "in plain torch, slowly: its kernel takes float32 on the CPU\n  mend: call it in float32, without autocast"
    assert [record.getMessage() for record in caplog.records] == [
        f"kernel_quantize computes bfloat16 on cpu {takes}",
        f"kernel_quantize computes float16 on cpu {takes}",
        "kernel_attention computes float32 on cpu in plain torch, slowly: 1025 channels a head, its kernel takes 1024\n"
        "  mend: leave quantize-attention out of the policy",
    ]
