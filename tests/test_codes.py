"""The native operator that writes codes: against plain torch, over instruction sets, layouts and sizes."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dmqfx.numbers import quant
from dmqfx.runtime.kernels import codes, recipes
from dmqfx.runtime.kernels.native import library

native = library()
SETS = native.instruction_sets if native is not None else ()

Parameters = tuple[Tensor, Tensor, Tensor]


def parameters(batch: int, channels: int, wide: bool, low: int = 0) -> Parameters:
    """Scale, zero point and index of two timestep groups."""
    columns = channels if wide else 1
    zero_point = torch.randint(low, 120, (2, columns), dtype=torch.int32)
    return torch.rand(2, columns) * 0.05 + 0.01, zero_point, torch.arange(batch) % 2


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((2, 7, 3, 5), 1),
        ((3, 64, 9, 8), 1),
        ((1, 1, 1, 1), 1),
        ((0, 8, 4, 4), 1),
        ((2, 65, 130), 2),
        ((7, 3), 1),
    ],
)
def test_codes_of_numbers_alone_are_those_of_quantize(isa: str, shape: tuple[int, ...], axis: int) -> None:
    x = 3 * torch.randn(shape)
    x.view(-1)[:2] = torch.tensor([3e38, -3e38])[: x.numel()]
    for wide, qmin in product((False, True), (0, -128)):
        scale, zero_point, group = parameters(shape[0], shape[axis], wide, min(qmin + 8, 0))
        expected = quant.quantize(x, scale, zero_point, group, axis, qmin, qmin + 255)
        for laid in (x, x.transpose(-1, 0).contiguous().transpose(-1, 0)):
            found = codes.quantize(
                laid, scale, zero_point, group, axis, qmin, qmin + 255, instruction_set=isa
            )
            assert torch.equal(found, expected)
            assert found.dtype == expected.dtype
        if len(shape) == 4:
            assert found.is_contiguous(memory_format=torch.channels_last)
            last = x.contiguous(memory_format=torch.channels_last)
            again = codes.quantize(
                last, scale, zero_point, group, axis, qmin, qmin + 255, instruction_set=isa
            )
            assert torch.equal(again, expected)


def test_halves_are_rounded_to_even() -> None:
    x, one = torch.arange(-3.5, 4).reshape(1, -1), torch.ones(1, 1)
    found = codes.quantize(x, one, torch.full((1, 1), 100, dtype=torch.int32), None, 1, 0, 255)
    assert found.tolist() == [[96, 98, 98, 100, 100, 102, 102, 104]]


def activated(x: Tensor, activation: str) -> Tensor:
    if activation == "geglu":
        x, gate = x.chunk(2, -1)
        return x * F.gelu(gate)
    return {"none": lambda y: y, "silu": F.silu, "gelu": F.gelu}[activation](x)


FUSED = [
    (norm, each)
    for norm, each in product(codes.NORMS, codes.ACTIVATIONS)
    if each != "geglu" or norm == "none"
]


@pytest.mark.parametrize(("norm", "activation"), FUSED)
@pytest.mark.parametrize("channels", [60, 128, 132])
@pytest.mark.parametrize("wide", [True, False])
def test_fused_codes_are_those_of_torch_but_for_ties_and_the_same_from_every_set(
    norm: str, activation: str, channels: int, wide: bool
) -> None:
    rows, groups = norm == "layer" or activation == "geglu", math.gcd(channels, 12)
    shape, axis = ((4, 132, channels), 2) if rows else ((4, channels, 12, 11), 1)
    x, weight, bias = (
        3 * torch.randn(shape) + 5 * (activation != "geglu"),
        torch.randn(channels),
        torch.randn(channels),
    )
    scale, zero_point, group = parameters(4, channels // 2 if activation == "geglu" else channels, wide)
    normed = {
        "none": lambda y: y,
        "group": lambda y: F.group_norm(y, groups, weight.to(y), bias.to(y), 1e-5),
        "layer": lambda y: F.layer_norm(y, (channels,), weight.to(y), bias.to(y), 1e-5),
    }[norm]
    real = activated(normed(x.double()), activation)
    expected = quant.quantize(real, scale.double(), zero_point, group, axis, 0, 255)
    given = (norm, groups if norm == "group" else 1, weight, bias, 1e-5, activation)
    inputs: list[tuple[Tensor, Tensor | None]] = [(x, None)]
    if not rows:
        last, arms = x.contiguous(memory_format=torch.channels_last), x.split([channels - 16, 16], 1)
        inputs += [(last, None), (arms[0], arms[1])]
        inputs += [tuple(arm.contiguous(memory_format=torch.channels_last) for arm in arms)]
    grid = (scale, zero_point, group, axis, 0, 255)
    for one, beside in inputs:
        found = [codes.quantize(one, *grid, *given, beside, instruction_set=isa) for isa in SETS]
        assert all(torch.equal(each, found[0]) for each in found)
        assert_equal_but_for_ties(
            found[0], expected, real / quant.spread(scale.double(), group, axis, len(shape))
        )
        assert int((found[0] != expected).sum()) <= 4 * channels // 60
    assert len(expected.unique()) > 100


@pytest.mark.parametrize("channels", [60, 128, 132])
@pytest.mark.parametrize("which", ["both", "scale", "shift"])
def test_what_a_group_norm_makes_is_scaled_and_shifted_for_each_image(channels: int, which: str) -> None:
    x, weight, bias = 3 * torch.randn(4, channels, 12, 11) + 5, torch.randn(channels), torch.randn(channels)
    groups = math.gcd(channels, 12)
    halves = (1 + torch.randn(4, 2 * channels))[:, :, None, None].chunk(2, 1)  # as diffusers has them
    scale, shift = (
        half if which in ("both", name) else None
        for half, name in zip(halves, ("scale", "shift"), strict=True)
    )
    steps, zero_point, group = parameters(4, channels, wide=True)
    normed = F.group_norm(x.double(), groups, weight.double(), bias.double(), 1e-5)
    real = F.silu(
        normed * (1 if scale is None else scale.double()) + (0 if shift is None else shift.double())
    )
    expected = quant.quantize(real, steps.double(), zero_point, group, 1, 0, 255)
    given = (steps, zero_point, group, 1, 0, 255, "group", groups, weight, bias, 1e-5, "silu")
    last, arms = x.contiguous(memory_format=torch.channels_last), x.split([channels - 16, 16], 1)
    apart = tuple(arm.contiguous(memory_format=torch.channels_last) for arm in arms)
    inputs: list[tuple[Tensor, Tensor | None]] = [
        (x, None),
        (last, None),
        (arms[0], arms[1]),
        (apart[0], apart[1]),
    ]
    for one, beside in inputs:
        found = [codes.quantize(one, *given, beside, scale, shift, isa) for isa in SETS]
        assert all(torch.equal(each, found[0]) for each in found)
        exact = real / quant.spread(steps.double(), group, 1, 4)
        assert_equal_but_for_ties(found[0], expected, exact)
        assert int((found[0] != expected).sum()) <= 4 * channels // 60
    assert len(expected.unique()) > 100
    plain = codes.quantize(
        x.double(),
        steps.double(),
        *given[1:8],
        weight.double(),
        bias.double(),
        1e-5,
        "silu",
        None,
        None if scale is None else scale.double(),
        None if shift is None else shift.double(),
    )
    assert torch.equal(plain, expected)


def test_a_scale_and_shift_that_do_not_fit_are_refused() -> None:
    x, grid = torch.randn(2, 8, 3, 3), (torch.ones(1, 1), torch.zeros(1, 1).int(), None, 1, 0, 255)
    with pytest.raises(ValueError, match="only a group norm has them"):
        codes.quantize(x, *grid, norm_scale=torch.ones(2, 8, 1, 1))
    for wrong in ((1, 8, 1, 1), (2, 4, 1, 1), (2, 8)):
        with pytest.raises(ValueError, match=r"have shape \[2, 8, 1, 1\], not"):
            codes.quantize(x, *grid, "group", 2, norm_shift=torch.ones(wrong))


def assert_equal_but_for_ties(found: Tensor, expected: Tensor, exact: Tensor) -> None:
    """`exact` is what was rounded: numbers in the middle of two codes may have either."""
    off = (found.int() - expected.int()).abs()
    tie = ((exact - exact.floor()) - 0.5).abs() < 1e-4 * exact.abs().clamp(min=1)
    assert int(off.max()) <= 1
    assert bool(tie[off > 0].all())


def test_gelu_holds_over_all_magnitudes() -> None:
    x = torch.cat([-torch.logspace(-6, 38, 4000), torch.logspace(-6, 3, 4000), torch.linspace(-6, 6, 4000)])
    scale, zero_point = torch.full((1, 1), 0.002), torch.full((1, 1), 90, dtype=torch.int32)
    given = (scale, zero_point, None, 1, 0, 255)
    found = codes.quantize(x.reshape(1, -1), *given, activation="gelu")
    exact = quant.quantize(F.gelu(x.double()).reshape(1, -1), *given)
    assert int((found.int() - exact.int()).abs().sum()) <= 2
    assert len(found.unique()) > 150


def test_silu_holds_over_all_magnitudes() -> None:
    x = torch.cat([-torch.logspace(-6, 38, 4000), torch.logspace(-6, 3, 4000)]).reshape(1, -1)
    scale, zero_point = torch.full((1, 1), 0.01), torch.full((1, 1), 30, dtype=torch.int32)
    given = (scale, zero_point, None, 1, 0, 255)
    found = codes.quantize(x, *given, activation="silu")
    assert int((found.int() - quant.quantize(F.silu(x), *given).int()).abs().sum()) <= 1


def test_a_mean_far_from_zero_does_not_drown_the_deviation() -> None:
    x = torch.randn(1, 8, 32, 32) + 1000
    scale, zero_point = torch.full((1, 1), 0.05), torch.full((1, 1), 128, dtype=torch.int32)
    found = codes.quantize(x, scale, zero_point, None, 1, 0, 255, "group", 2, None, None, 1e-5)
    expected = quant.quantize(F.group_norm(x.double(), 2), scale.double(), zero_point, None, 1, 0, 255)
    assert float((found != expected).float().mean()) < 0.01


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize(("first", "second"), [(64, 64), (3, 70), (130, 1), (160, 96)])
def test_two_arms_have_the_codes_of_their_concatenation(isa: str, first: int, second: int) -> None:
    arms = [
        torch.randn(3, width, 5, 7).contiguous(memory_format=torch.channels_last) for width in (first, second)
    ]
    whole = torch.cat(arms, 1)
    for wide, low in product((False, True), (0, -128)):
        grid = (*parameters(3, first + second, wide, low), 1, low, low + 255)
        found = codes.quantize(arms[0], *grid, beside=arms[1], instruction_set=isa)
        assert torch.equal(found, quant.quantize(whole, *grid))
        assert found.is_contiguous(memory_format=torch.channels_last)
        mixed = codes.quantize(arms[0].contiguous(), *grid, beside=arms[1], instruction_set=isa)
        assert torch.equal(mixed, found)
        plain = codes.quantize(arms[0].double(), *grid, beside=arms[1].double(), instruction_set=isa)
        assert torch.equal(plain, quant.quantize(whole.double(), *grid))


@pytest.mark.parametrize("channels", [8, 96, 2 * 70])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_group_norm_of_rows_holds_for_groups_of_any_size_and_means_far_from_zero(
    channels: int, groups: int
) -> None:
    x = torch.randn(2, channels, 16, 17) + 1000 * torch.randn(1, channels, 1, 1).sign()
    scale, zero_point = torch.full((1, 1), 0.002), torch.full((1, 1), 128, dtype=torch.int32)
    last = x.contiguous(memory_format=torch.channels_last)
    found = codes.quantize(last, scale, zero_point, None, 1, 0, 255, "group", groups, None, None, 1e-5)
    planes = codes.quantize(x, scale, zero_point, None, 1, 0, 255, "group", groups, None, None, 1e-5)
    expected = quant.quantize(F.group_norm(x.double(), groups), scale.double(), zero_point, None, 1, 0, 255)
    for each in (found, planes):
        assert int((each.int() - expected.int()).abs().max()) <= 1
        assert float((each != expected).float().mean()) < 0.02


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("factor", [1e4, 1e8, 1e19, math.inf, math.nan])
def test_a_channel_that_is_far_out_is_felt_in_its_own_group_alone(
    isa: str, last: bool, factor: float
) -> None:
    x, first = torch.randn(2, 64, 9, 11), torch.arange(64).view(-1, 1, 1) % 32 == 0  # of groups 0 and 4
    scale, zero_point = torch.full((1, 1), 0.02), torch.full((1, 1), 128, dtype=torch.int32)
    given = (scale, zero_point, None, 1, 0, 255, "group", 8, None, None, 1e-5)
    layout = torch.channels_last if last else torch.contiguous_format
    quiet, loud = (
        codes.quantize(each.contiguous(memory_format=layout), *given, instruction_set=isa)
        for each in (x, torch.where(first, x * factor, x))
    )
    others = [c for c in range(64) if c // 8 not in (0, 4)]
    assert torch.equal(loud[:, others], quiet[:, others])
    assert not torch.equal(loud, quiet)


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("last", [True, False])
def test_each_sample_of_many_has_the_codes_that_it_has_alone(isa: str, last: bool) -> None:
    x = torch.randn(11, 70, 18, 17) * torch.arange(1, 12).reshape(
        -1, 1, 1, 1
    )  # more than are worked on at once
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    scale, zero_point, group = parameters(11, 70, True)
    norm = ("group", 7, torch.randn(70), torch.randn(70), 1e-5, "silu")
    found = codes.quantize(x, scale, zero_point, group, 1, 0, 255, *norm, instruction_set=isa)
    for k in range(11):
        one, its = x[k : k + 1], group[k : k + 1]
        alone = codes.quantize(one, scale, zero_point, its, 1, 0, 255, *norm, instruction_set=isa)
        assert torch.equal(found[k : k + 1], alone)


def test_what_is_found_once_is_found_again_where_somebody_writes_into_it_and_goes_with_the_scale() -> None:
    x = torch.randn(2, 8, 5, 5)
    tensors = {"weight": torch.rand(8), "bias": torch.rand(8), "zero_point": torch.full((1, 1), 9)}
    tensors["scale"] = torch.full((1, 8), 0.02)

    def made(of: dict[str, Tensor]) -> Tensor:
        norm = ("group", 2, of["weight"], of["bias"], 1e-5, "silu")
        return codes.quantize(x, of["scale"], of["zero_point"], None, 1, 0, 255, *norm)

    def agree() -> Tensor:
        found = made(tensors)
        assert torch.equal(found, made({name: each.clone() for name, each in tensors.items()}))
        return found

    known, before = len(recipes._KNOWN), agree()
    assert len(recipes._KNOWN) == known + 1
    for name in tensors:
        tensors[name].add_(1)
        changed = agree()
        assert not torch.equal(before, changed), name
        tensors[name] = tensors[name].clone().sub_(1)
        assert torch.equal(before, agree()), name
    tensors["bias"].data = tensors["bias"] + 1
    assert not torch.equal(before, agree())
    shorter = codes.quantize(x, tensors["scale"], tensors["zero_point"], None, 1, 0, 255)
    assert not torch.equal(before, shorter)
    with torch.inference_mode():
        tensors = {name: each.clone() for name, each in tensors.items()}
        before = agree()
        tensors["scale"].mul_(2)
        assert not torch.equal(before, agree())
    assert len(recipes._KNOWN) == known


def test_mistakes_are_told() -> None:
    x, one, zero = torch.randn(2, 6, 4, 4), torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match="do not fall into 4 groups"):
        codes.quantize(x, one, zero, None, 1, 0, 255, "group", 4)
    with pytest.raises(ValueError, match="channels on axis 2"):
        codes.quantize(x, one, zero, None, 2, 0, 255)
    with pytest.raises(ValueError, match="a layer norm with channels on axis 1"):
        codes.quantize(x, one, zero, None, 1, 0, 255, "layer")
    with pytest.raises(ValueError, match="behind a layer norm"):
        codes.quantize(x, one, zero, None, 3, 0, 255, "layer", activation="geglu")
    with pytest.raises(ValueError, match="halves of an even last axis"):
        codes.quantize(x[..., :3], one, zero, None, 3, 0, 255, activation="geglu")
    with pytest.raises(ValueError, match="need a group index"):
        codes.quantize(x, one.expand(2, 1), zero.expand(2, 1), None, 1, 0, 255)
    with pytest.raises(ValueError, match="2 rows of scales, 1 of zero points"):
        codes.quantize(x, one.expand(2, 1), zero, None, 1, 0, 255)
    with pytest.raises(ValueError, match="beyond the 1"):
        codes.quantize(x, one, zero, torch.tensor([0, 1]), 1, 0, 255)
    with pytest.raises(ValueError, match="beyond the 1"):
        codes.quantize(x, one, zero, torch.tensor([0, -1]), 1, 0, 255)
    with pytest.raises(ValueError, match="3 timestep groups for 2 samples"):
        codes.quantize(x, one, zero, torch.tensor([0, 0, 0]), 1, 0, 255)
    with pytest.raises(ValueError, match=r"do not lie beside each other on axis 1"):
        codes.quantize(x, one, zero, None, 1, 0, 255, beside=x[:1])
    with pytest.raises(ValueError, match=r"do not lie beside each other on axis 1"):
        codes.quantize(x, one, zero, None, 3, 0, 255, beside=x)
