"""An observer changes nothing and ends with the statistics of all data at once, however it arrived."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dmqfx.errors import CalibrationError
from dmqfx.numbers import observers
from dmqfx.numbers.observers import Observer

SITE = "mid_block.resnets.0.conv1/conv2d:input"


def expected(x: Tensor, axis: int) -> tuple[Tensor, ...]:
    """Low, high, mean and variance per channel of all of x, in float64."""
    values = x.double().movedim(axis, 0).flatten(1)
    return values.amin(1), values.amax(1), values.mean(1), values.var(1, correction=0)


@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    layout=st.sampled_from([((3,), -1), ((4, 3), -1), ((3, 4, 5), 1), ((2, 5, 3), -1)]),
    groups=st.integers(1, 4),
    offset=st.sampled_from([0.0, 1000.0]),
    seed=st.integers(0, 1000),
)
def test_the_result_does_not_depend_on_how_the_data_was_cut(
    sizes: list[int], layout: tuple[tuple[int, ...], int], groups: int, offset: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    (shape, axis), rows = layout, sum(sizes)
    x = torch.randn(rows, *shape, generator=generator) + offset
    group = torch.randint(groups, (rows,), generator=generator)
    observer = Observer(SITE, axis, tuple(float(b) for b in range(groups - 1)))
    for part, index in zip(x.split(sizes), group.split(sizes), strict=True):
        assert observer(part, index if groups > 1 else None) is part
    seen = observer.result()
    for g in group.unique().tolist():
        low, high, mean, variance = expected(x[group == g], axis)
        assert torch.equal(seen.low[g].double(), low)
        assert torch.equal(seen.high[g].double(), high)
        torch.testing.assert_close(seen.mean[g].double(), mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(seen.variance[g].double(), variance, rtol=1e-4, atol=1e-6)
    values = x[0].numel() // 3
    assert seen.count.tolist() == [int((group == g).sum()) * values for g in range(groups)]
    assert (seen.axis, seen.boundaries) == (axis, observer.boundaries)


@pytest.mark.parametrize("grouped", [False, True])
def test_rows_too_large_to_take_together_are_taken_in_turn(
    monkeypatch: pytest.MonkeyPatch, grouped: bool
) -> None:
    monkeypatch.setattr(observers, "_ELEMENTS", 30)
    x, group = torch.randn(7, 3, 4), torch.tensor([0, 1, 1, 0, 1, 1, 1])
    observer = Observer(SITE, 1, (500.0,) if grouped else ())
    observer(x, group if grouped else None)
    seen = observer.result()
    last = x[group == 1] if grouped else x
    torch.testing.assert_close(seen.mean[-1].double(), expected(last, 1)[2])
    assert seen.count.tolist() == ([8, 20] if grouped else [28])


def test_an_empty_group_takes_the_numbers_of_the_nearest_one_the_earlier_if_two_are() -> None:
    observer = Observer(SITE, -1, (100.0, 200.0, 300.0, 400.0, 500.0))
    observer(torch.tensor([[1.0], [4.0]]), torch.tensor([1, 3]))
    seen = observer.result()
    assert seen.low[:, 0].tolist() == [1, 1, 1, 4, 4, 4]
    assert seen.mean[:, 0].tolist() == [1, 1, 1, 4, 4, 4]
    assert seen.count.tolist() == [0, 1, 0, 1, 0, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("late", [False, True])
def test_a_value_that_is_not_finite_is_reported_with_site_and_place(bad: float, late: bool) -> None:
    x, fine = torch.ones(2, 3, 4), torch.ones(2, 3, 4)
    x[1, 2, 3] = bad
    observer = Observer(SITE, 1, (500.0,))
    for part in (fine, x) if late else (x, fine):
        observer(part, torch.tensor([0, 1]))
    with pytest.raises(
        CalibrationError, match=r"conv1/conv2d:input.*not finite in channel 2 of timestep group 1"
    ):
        observer.result()


def test_a_site_that_no_row_reached_is_reported() -> None:
    observer = Observer(SITE, 1)
    observer(torch.empty(0, 3, 4))
    with pytest.raises(CalibrationError, match=r"conv1/conv2d:input: no calibration row"):
        observer.result()


def test_a_group_index_that_does_not_fit_the_rows_is_reported() -> None:
    with pytest.raises(CalibrationError, match=r"needs a group index of 2 rows, not 1"):
        Observer(SITE, 1, (500.0,))(torch.ones(2, 3), torch.tensor([0]))
    with pytest.raises(CalibrationError, match=r"needs a group index of 2 rows, not None"):
        Observer(SITE, 1, (500.0,))(torch.ones(2, 3))
    with pytest.raises(CalibrationError, match=r"needs no group index, not 2"):
        Observer(SITE, 1)(torch.ones(2, 3), torch.tensor([0, 0]))


def test_channels_cannot_change_on_the_way() -> None:
    observer = Observer(SITE, 1)
    observer(torch.ones(2, 3))
    with pytest.raises(CalibrationError, match="3 channels before and 4 now on axis 1"):
        observer(torch.ones(2, 4))


def test_what_was_seen_is_let_go() -> None:
    observer, sizes = Observer(SITE, 1, (500.0,)), list[int]()
    for rows in (2, 4, 40):
        observer(torch.randn(rows, 3, 8, 8), torch.arange(rows) % 2)
        sizes.append(len(pickle.dumps(observer)))
    assert max(sizes) < min(sizes) + 100


def test_a_copy_goes_on_without_its_original() -> None:
    observer = Observer(SITE, 1)
    observer(torch.ones(2, 3))
    other = copy.deepcopy(observer)
    other(torch.full((2, 3), 5.0))
    assert observer.result().high.tolist() == [[1, 1, 1]]
    assert other.result().high.tolist() == [[5, 5, 5]]


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)],
)
def test_numbers_come_in_the_precision_of_the_data_but_at_least_float32(
    dtype: torch.dtype, kept: torch.dtype
) -> None:
    observer = Observer(SITE, 1)
    x = torch.randn(2, 3, 5).to(dtype)
    observer(x)
    seen = observer.result()
    assert {value.dtype for value in (seen.low, seen.high, seen.mean, seen.variance)} == {kept}
    torch.testing.assert_close(seen.variance[0], expected(x, 1)[3].to(kept))
