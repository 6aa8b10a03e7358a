"""Ranges of activations that are judged by sampled values."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dmqfx.numbers.fitting import RowExtremes, Sample, percentile, search
from dmqfx.numbers.quant import QuantSpec, fake_quantize, params_from_range

SPEC = QuantSpec(6, range="mse")


def sample(values: Tensor, groups: int = 1, felt: Tensor | None = None) -> Sample:
    group = torch.arange(len(values)) * groups // len(values)
    return Sample(values, group, torch.ones(values.shape[1]) if felt is None else felt)


def ends(of: Sample, groups: int = 1) -> tuple[Tensor, Tensor]:
    parts = [of.values[of.group == k] for k in range(groups)]
    return torch.stack([part.min() for part in parts]), torch.stack([part.max() for part in parts])


def error(of: Sample, low: Tensor, high: Tensor, spec: QuantSpec) -> float:
    params = params_from_range(low[:, None], high[:, None], spec, None)
    group = of.group if spec.boundaries else None
    change = fake_quantize(of.values, params, group) - of.values
    return float((change.double().square() * of.felt).sum())


@given(
    seed=st.integers(0, 2**31),
    bits=st.integers(4, 8),
    grid=st.sampled_from(["affine", "symmetric"]),
    tail=st.sampled_from([1.0, 2.0, 4.0]),
    offset=st.floats(-3, 3),
)
def test_the_searched_range_is_never_worse_than_the_whole(
    seed: int, bits: int, grid: str, tail: float, offset: float
) -> None:
    normal = torch.randn(400, 8, generator=torch.Generator().manual_seed(seed))
    of = sample(normal.sign() * normal.abs() ** tail + offset)
    spec = QuantSpec(bits, grid, range="mse")  # type: ignore[arg-type]  # one of the two words
    whole = ends(of)
    found = search(whole, of, spec)
    assert (
        error(of, *found, spec) <= error(of, *whole, spec) * 1.02
    )  # values are judged by their bins' middles
    assert found[0] >= whole[0] - 1e-6
    assert found[1] <= whole[1] + 1e-6


def test_a_long_tail_is_clipped_and_a_flat_one_is_not() -> None:
    flat = sample(torch.linspace(-1, 1, 4000).view(-1, 4))
    assert [float(end) for end in search(ends(flat), flat, SPEC)] == [-1.0, 1.0]
    tailed = sample(torch.randn(4000, 4) ** 3)
    low, high = search(ends(tailed), tailed, SPEC)
    assert float(high) < 0.9 * float(ends(tailed)[1])
    assert error(tailed, low, high, SPEC) < 0.9 * error(tailed, *ends(tailed), SPEC)


def test_both_ends_move_on_their_own() -> None:
    values = torch.nn.functional.silu(torch.randn(4000, 4) * 2)
    values[0, 0] = 16.0
    of = sample(values)
    low, high = search(ends(of), of, SPEC)
    whole_low, whole_high = ends(of)
    assert float(low) == pytest.approx(float(whole_low))
    assert float(high) < 0.9 * float(whole_high)


def test_columns_that_are_felt_decide() -> None:
    values = torch.cat([torch.randn(4000, 1), 10 * torch.randn(4000, 1)], 1)
    narrow = sample(values, felt=torch.tensor([1.0, 1e-6]))
    wide = sample(values, felt=torch.tensor([1e-6, 1.0]))
    assert search(ends(narrow), narrow, SPEC)[1] < search(ends(wide), wide, SPEC)[1] / 2


def test_groups_are_judged_by_their_own_values() -> None:
    one, other = torch.randn(2000, 4), 5 * torch.randn(2000, 4)
    spec = QuantSpec(6, range="mse", boundaries=(500.0,))
    both = sample(torch.cat([one, other]), 2)
    found = search(ends(both, 2), both, spec)
    for k, values in enumerate((one, other)):
        alone = sample(values)
        expected = search(ends(alone), alone, SPEC)
        assert torch.equal(torch.stack([end[k] for end in found]), torch.cat(expected))


def test_a_group_without_values_keeps_its_range() -> None:
    of = Sample(torch.randn(100, 4), torch.zeros(100, dtype=torch.long), torch.ones(4))
    low, high = search(
        (torch.tensor([-9.0, -7.0]), torch.tensor([9.0, 7.0])), of, QuantSpec(6, boundaries=(1.0,))
    )
    assert (float(low[1]), float(high[1])) == (-7.0, 7.0)
    assert float(high[0]) < 9.0


def test_values_that_are_all_zero_keep_their_range() -> None:
    of = sample(torch.zeros(10, 3))
    low, high = search((torch.zeros(1), torch.zeros(1)), of, SPEC)
    assert (float(low), float(high)) == (0.0, 0.0)


@pytest.mark.parametrize("huge", [1e10, 1e30])
def test_huge_values_are_no_trouble(huge: float) -> None:
    of = sample(torch.randn(500, 4) * huge)
    low, high = search(ends(of), of, SPEC)
    assert torch.isfinite(low).all()
    assert torch.isfinite(high).all()
    assert error(Sample(of.values / huge, of.group, of.felt), low / huge, high / huge, SPEC) < 4


@given(percent=st.floats(90, 100), seed=st.integers(0, 2**31))
def test_a_percentile_leaves_its_share_outside(percent: float, seed: int) -> None:
    of = sample(torch.randn(2000, 5, generator=torch.Generator().manual_seed(seed)))
    low, high = percentile(ends(of), of, percent)
    outside = 100 * float(((of.values < low) | (of.values > high)).double().mean())
    assert outside <= 100 - percent + 1e-9
    finer = (ends(of)[1] - ends(of)[0]) / 1024
    beyond = 100 * float(((of.values < low + finer) | (of.values > high - finer)).double().mean())
    assert beyond >= 100 - percent - 1e-9


def test_the_average_of_rows_is_begun_anew_in_every_group() -> None:
    low, high = torch.tensor([-4.0, -2.0, -8.0])[:, None], torch.tensor([4.0, 2.0, 8.0])[:, None]
    rows = RowExtremes(low, high, torch.tensor([0, 0, 1]), 0.75)
    found = rows.average((torch.tensor([-4.0, -8, -1]), torch.tensor([4.0, 8, 1])))
    assert found[0].tolist() == [-3.5, -8.0, -1.0]
    assert found[1].tolist() == [3.5, 8.0, 1.0]


@given(seed=st.integers(0, 2**31), momentum=st.floats(0, 0.99), scaled=st.booleans())
def test_the_average_of_rows_is_that_of_an_observer_that_sees_one_after_the_other(
    seed: int, momentum: float, scaled: bool
) -> None:
    drawn = torch.Generator().manual_seed(seed)
    x, group = torch.randn(12, 3, 7, generator=drawn), torch.randint(3, (12,), generator=drawn)
    gamma = torch.rand(3, generator=drawn) + 0.5 if scaled else None
    seen = x if gamma is None else x / gamma[:, None]
    whole = torch.full((3,), -9.0), torch.full((3,), 9.0)
    rows = RowExtremes(x.amin(2), x.amax(2), group, momentum)
    low, high = rows.average(whole, gamma)
    for k in range(3):
        own = [(float(row.min()), float(row.max())) for row in seen[group == k]]
        wanted = own[0] if own else (-9.0, 9.0)
        for each in own[1:]:
            wanted = tuple(momentum * a + (1 - momentum) * b for a, b in zip(wanted, each, strict=True))
        assert (float(low[k]), float(high[k])) == pytest.approx(wanted, rel=1e-5)


@given(seed=st.integers(0, 2**31), size=st.integers(1, 6))
def test_batches_are_of_one_group_and_every_row_is_in_one(seed: int, size: int) -> None:
    drawn = torch.Generator().manual_seed(seed)
    group = torch.randint(3, (17,), generator=drawn)
    number = torch.arange(17.0)[:, None]  # every row tells which one it is
    batches = RowExtremes(-number, number, group, 0.5).joined(size, drawn)
    count = torch.bincount(group, minlength=3)
    assert torch.bincount(batches.group, minlength=3).tolist() == (-(-count // size)).tolist()
    assert batches.momentum == 0.5
    for k in range(3):
        own, ends = group == k, batches.group == k
        if bool(own.any()):
            assert float(batches.high[ends].max()) == float(number[own].max())
            assert float(batches.low[ends].min()) == -float(number[own].max())
            assert float(batches.low[ends].max()) <= -float(number[own].min())
    if size == 1:
        assert sorted(batches.high.flatten().tolist()) == number.flatten().tolist()


def test_a_batch_of_all_rows_of_a_group_has_its_extremes() -> None:
    low, high = torch.tensor([-4.0, -2.0, -8.0])[:, None], torch.tensor([4.0, 2.0, 8.0])[:, None]
    rows = RowExtremes(low, high, torch.tensor([0, 0, 1]), 0.75).joined(16, torch.Generator())
    found = rows.average((torch.tensor([0.0, 0, -1]), torch.tensor([0.0, 0, 1])))
    assert found[0].tolist() == [-4.0, -8.0, -1.0]
    assert found[1].tolist() == [4.0, 8.0, 1.0]


def test_an_average_of_rows_that_come_by_timestep_is_not_that_of_the_last_timestep() -> None:
    """Rows are recorded from the noisiest to the cleanest, whose extremes would be all that is left."""
    falling = torch.linspace(4, 1, 160)[:, None]
    rows = RowExtremes(-falling, falling, torch.zeros(160, dtype=torch.int64))
    for seed in range(8):
        joined = rows.joined(1, torch.Generator().manual_seed(seed))
        (low,), (high,) = joined.average((torch.tensor([-4.0]), torch.tensor([4.0])))
        assert 1.9 < float(high) < 3.1
        assert float(low) == -float(high)


def test_batches_are_drawn_at_random_and_the_same_by_the_same_seed() -> None:
    number, group = torch.arange(64.0)[:, None], torch.arange(64) % 2
    rows = RowExtremes(-number, number, group)
    one, same, other = (rows.joined(4, torch.Generator().manual_seed(seed)).high for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert (
        rows.joined(1, torch.Generator().manual_seed(1)).high.flatten().tolist() != number.flatten().tolist()
    )
    assert one.flatten().tolist() != sorted(one.flatten().tolist())
