"""Voting on power-of-two steps: each claim of the arithmetic, without any graph."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dmqfx.numbers.quant import QParams, QuantSpec, fake_quantize, params_from_range
from dmqfx.numbers.voting import Ballot, nearest_full, step_errors


def by_definition(x: Tensor, params: QParams, group: Tensor, axis: int, largest: int) -> Tensor:
    """The error of every row, channel and step, one after another, by quantizing with that step."""
    found = torch.zeros(len(x), x.shape[axis], largest + 1, dtype=torch.float64)
    for n, row in enumerate(x.movedim(axis, 1)):
        for channel, values in enumerate(row):
            for j in range(largest + 1):
                scale, zero = params.scale[group[n]], params.zero_point[group[n]]
                step = QParams(scale[None] * 2.0 ** (j - largest), zero[None], params.qmin, params.qmax, None)
                error = fake_quantize(values, step) - values
                found[n, channel, j] = error.double().square().mean()
    return found


def case(
    x: Tensor, axis: int, bits: int = 8, grid: str = "affine", groups: int = 1
) -> tuple[QParams, Tensor]:
    """Parameters that reach over x in each timestep group, rows dealt out to groups in turn."""
    group = torch.arange(len(x)) % groups
    flat = x.reshape(len(x), -1)
    low, high = (
        torch.stack([end(flat[group == g]) for g in range(groups)])[:, None] for end in (torch.min, torch.max)
    )
    spec = QuantSpec(bits, grid, boundaries=tuple(map(float, range(1, groups))))
    return params_from_range(low, high, spec, None), group


def errors(x: Tensor, params: QParams, group: Tensor, axis: int, largest: int = 3) -> Tensor:
    scale, zero_point = params.scale[group, 0], params.zero_point[group, 0]
    return step_errors(x, scale, zero_point, (params.qmin, params.qmax), axis, largest)


# --- the error of a step


@given(
    st.sampled_from([((4, 3, 2, 5), 1), ((4, 5, 3), -1), ((4, 3, 3), -1), ((4, 3), -1), ((4, 2, 5, 3), -1)]),
    st.sampled_from((4, 6, 8)),
    st.sampled_from(("affine", "symmetric")),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(0, 2**31),
)
def test_an_error_is_that_of_quantizing_with_the_step(
    shape: tuple[tuple[int, ...], int], bits: int, grid: str, groups: int, largest: int, seed: int
) -> None:
    dims, axis = shape
    generator = torch.Generator().manual_seed(seed)
    uneven = torch.exp2(-torch.arange(dims[axis]).float()).reshape(
        [-1 if d == axis % len(dims) else 1 for d in range(len(dims))]
    )
    x = (torch.randn(dims, generator=generator, dtype=torch.float64) + 0.5) * uneven
    params, group = case(x, axis, bits, grid, groups)
    expected = by_definition(x, params, group, axis, largest)
    torch.testing.assert_close(errors(x, params, group, axis, largest), expected, rtol=1e-9, atol=1e-15)


def test_channels_of_tokens_lie_on_the_last_axis() -> None:
    """The published code counts channels on axis 1, which are the tokens of a linear layer's input."""
    x = torch.randn(2, 4, 4) * torch.tensor([1.0, 1.0, 1.0, 0.01])  # as many tokens as channels
    params, group = case(x, -1)
    best = errors(x, params, group, -1).argmin(2)
    assert best[:, :3].min() >= 2
    assert best[:, 3].tolist() == [0, 0]


@pytest.mark.parametrize("size", [1e-30, 1e10, 1e30])
def test_errors_neither_overflow_nor_vanish(size: float) -> None:
    x = torch.randn(2, 3, 4, 4)
    params, group = case(x, 1)
    found = errors(x * size, QParams(params.scale * size, *_rest(params)), group, 1)
    torch.testing.assert_close(found / size**2, errors(x, params, group, 1), rtol=1e-3, atol=1e-9)


def _rest(params: QParams) -> tuple[Tensor, int, int, int | None, tuple[float, ...]]:
    return params.zero_point, params.qmin, params.qmax, params.axis, params.boundaries


# --- the vote


def ballot(*votes: list[list[float]], group: list[int] | None = None, groups: int = 1) -> Ballot:
    """A ballot of rows, each with the errors of the steps of each channel."""
    rows = torch.tensor(votes, dtype=torch.float64)
    made = Ballot(groups, rows.shape[1], rows.shape[2] - 1)
    made.add(rows, torch.tensor(group or [0] * len(rows)))
    return made


FINE, OWN = [0.1, 0.2, 0.4], [0.4, 0.2, 0.1]


def test_a_channel_gets_what_enough_rows_want_and_else_the_sites_own_step() -> None:
    three_of_four = ballot([FINE], [FINE], [FINE], [OWN])
    assert three_of_four.elected(agree=0.75).tolist() == [[0]]
    assert three_of_four.elected(agree=0.76).tolist() == [[2]]


def test_without_agreement_no_channel_can_clip_more_than_before() -> None:
    """The fallback is the coarsest step, as in the published code; the paper's text says the finest."""
    torn = ballot([FINE], [OWN], [[0.2, 0.1, 0.4]])
    assert torn.elected(agree=0.5).tolist() == [[2]]


@pytest.mark.parametrize("share", [0.7, 0.85, 0.9])
def test_a_share_that_is_just_enough_is_enough(share: float) -> None:
    votes = [[FINE]] * round(20 * share) + [[OWN]] * (20 - round(20 * share))
    assert ballot(*votes).elected(agree=share).tolist() == [[0]]


def test_of_steps_as_good_as_each_other_the_coarsest_is_taken() -> None:
    equal = [0.0, 0.0, 0.0]
    assert ballot([equal], [equal]).votes.tolist() == [[[0, 0, 2]]]
    assert ballot([equal]).least().tolist() == [[2]]
    assert ballot([FINE], [[0.2, 0.1, 0.4]]).elected(agree=0.5).tolist() == [[1]]  # one vote for each of two


def test_constant_channels_take_the_coarsest_step_that_hits_them_and_a_dead_one_the_sites_own() -> None:
    constants = torch.tensor([0.0, 4.0, 1.5, 1.25, 1.125, 100.0])
    x = constants[None, :, None, None].expand(3, -1, 2, 2)
    params = QParams(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int32), 0, 15, None)
    made = Ballot(1, 6, 3)
    made.add(errors(x, params, torch.zeros(3, dtype=torch.long), 1), torch.zeros(3, dtype=torch.long))
    assert made.elected(agree=1.0).tolist() == made.least().tolist() == [[3, 3, 2, 1, 0, 3]]


def test_groups_do_not_mix_and_an_empty_one_takes_the_nearest() -> None:
    votes = ballot([FINE], [OWN], [OWN], group=[1, 3, 3], groups=5)
    assert votes.elected(agree=0.85).flatten().tolist() == [0, 0, 0, 2, 2]
    assert votes.least().flatten().tolist() == [0, 0, 0, 2, 2]
    assert nearest_full(torch.tensor([0, 1, 0, 2, 0])).tolist() == [1, 1, 1, 3, 3]


def test_a_shared_vote_is_one_of_all_rows() -> None:
    apart = ballot([FINE], [FINE], [OWN], group=[0, 1, 1], groups=2)
    together = ballot([FINE], [FINE], [OWN])
    assert torch.equal(apart.pooled().votes, together.votes)
    assert torch.equal(apart.pooled().elected(0.6), together.elected(0.6))


def test_one_outlier_row_decides_the_mean_and_not_the_vote() -> None:
    votes = ballot(*[[[0.1, 0.2]]] * 9, [[9.0, 0.2]])
    assert votes.elected(agree=0.85).tolist() == [[0]]
    assert votes.least().tolist() == [[1]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_error_that_is_not_finite_is_named_and_not_counted(bad: float) -> None:
    with pytest.raises(ValueError, match="channel 1 is not finite in timestep group 2"):
        ballot([FINE, FINE], [FINE, [bad, 0.1, 0.1]], group=[0, 2], groups=3)
    made = Ballot(1, 1, 2)
    with pytest.raises(ValueError):
        made.add(torch.full((1, 1, 3), bad), torch.zeros(1, dtype=torch.long))
    assert not made.votes.any()


@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 2**31))
def test_rows_may_come_in_any_chunks_and_any_order(count: int, size: int, seed: int) -> None:
    """So a batch may mix timesteps, and no row is held."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.rand(count, 3, 4, generator=generator, dtype=torch.float64)
    group = torch.randint(3, (count,), generator=generator)
    whole, parts = Ballot(3, 3, 3), Ballot(3, 3, 3)
    whole.add(rows, group)
    order = torch.randperm(count, generator=generator)
    for chunk in torch.split(order, size):
        parts.add(rows[chunk], group[chunk])
    assert torch.equal(whole.votes, parts.votes)
    torch.testing.assert_close(whole.errors, parts.errors)
    assert torch.equal(whole.elected(0.5), parts.elected(0.5))
