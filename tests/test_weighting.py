"""Weights of timestep groups, in what is learned."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dmqfx.numbers.weighting import TimestepWeights, Weighting
from dmqfx.policy.setting import PartialSpec
from dmqfx.runtime.operators import OPS

KINDS: tuple[Weighting, ...] = ("uniform", "linear", "quadratic", "adaptive", "focal", "published")


@given(seed=st.integers(0, 2**31), groups=st.integers(2, 20), strength=st.floats(0, 25))
def test_the_mended_weights_have_mean_one_and_favour_groups_of_small_loss(
    seed: int, groups: int, strength: float
) -> None:
    drawn = torch.Generator().manual_seed(seed)
    weights = TimestepWeights("adaptive", groups, strength)
    for _ in range(3):
        group = torch.randint(groups, (64,), generator=drawn)
        losses = torch.rand(64, generator=drawn) + group
        found = weights(losses, group)
        assert float(found.mean()) == pytest.approx(1.0, rel=1e-4)
    present = [k for k in range(groups) if bool((group == k).any())]
    by_group = torch.tensor([float(found[group == k][0]) for k in present])
    average = weights.average[present]
    assert bool((by_group[average.argsort()].diff() <= 1e-6).all())


@given(
    kind=st.sampled_from(KINDS),
    trained=st.sampled_from((37, 50, 1000, 4000)),
    groups=st.integers(1, 20),
    whole=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_timestep_of_any_schedule_has_a_weight(
    kind: Weighting, trained: int, groups: int, whole: bool, seed: int
) -> None:
    """The first and the last one too, whatever the number of training steps, and where timesteps are no whole numbers."""
    drawn = torch.rand(30, generator=torch.Generator().manual_seed(seed)) * (trained - 1)
    times = torch.cat([torch.tensor([0.0, trained - 1.0]), drawn.round() if whole else drawn])
    edges = torch.tensor(PartialSpec(groups=groups).boundaries(trained))
    group = OPS.timestep_group(times, edges)
    assert int(group.min()) == 0
    assert int(group.max()) == groups - 1
    found = TimestepWeights(kind, groups)(torch.rand(32) + 0.1, group)
    assert bool(found.isfinite().all())
    assert bool((found >= 0).all())


def test_without_renormalisation_the_weights_are_the_same_by_a_factor_and_at_most_one() -> None:
    drawn = torch.Generator().manual_seed(0)
    mended, focal = TimestepWeights("adaptive", 5, 3.0), TimestepWeights("focal", 5, 3.0)
    for _ in range(4):
        group, losses = torch.randint(5, (16,), generator=drawn), torch.rand(16, generator=drawn)
        one, two = mended(losses, group), focal(losses, group)
        torch.testing.assert_close(one, two / two.mean())
        assert float(two.max()) <= 1
        assert float(two.mean()) < 0.9


def test_an_absent_group_keeps_its_average_in_the_mended_form_and_decays_in_the_published_one() -> None:
    losses, first, rest = torch.ones(4), torch.tensor([0, 0, 1, 1]), torch.zeros(4, dtype=torch.int64)
    for kind, kept in (("adaptive", 1.0), ("published", 0.05 * 2 * 0.95**3)):
        weights = TimestepWeights(kind, 2, 1.0)  # type: ignore[arg-type]  # one of the two words
        for group in (first, rest, rest, rest):
            weights(losses, group)
        assert float(weights.average[1]) == pytest.approx(kept)


def test_the_average_of_the_mended_form_does_not_depend_on_how_often_a_group_is_drawn() -> None:
    weights = TimestepWeights("adaptive", 2, 20.0)
    found = weights(torch.tensor([2.0] * 9 + [2.0]), torch.tensor([0] * 9 + [1]))
    assert bool((found == 1).all())
    published = TimestepWeights("published", 2, 20.0)
    unequal = published(torch.tensor([2.0] * 9 + [2.0]), torch.tensor([0] * 9 + [1]))
    assert unequal[0] < unequal[-1] / 1e10


@pytest.mark.parametrize("kind", KINDS)
def test_of_one_timestep_nothing_weighs_less(kind: Weighting) -> None:
    """Its share of the loss is all; a weight of 0 would learn nothing."""
    weights = TimestepWeights(kind, 20, 20.0)
    for _ in range(3):
        found = weights(torch.rand(4) + 0.5, torch.full((4,), 7))
        assert bool((found > 0.5).all())
        assert bool((found == found[0]).all())


def test_the_published_form_by_hand() -> None:
    weights = TimestepWeights("published", 4, 2.0)
    group = torch.tensor([0, 1, 1, 3])
    found = weights(torch.tensor([1.0, 2.0, 3.0, 4.0]), group)
    average = 0.05 * torch.tensor([1.0, 5.0, 0.0, 4.0])
    torch.testing.assert_close(found, ((1 - average / average.sum()) ** 2)[group])


@pytest.mark.parametrize("kind", ["linear", "quadratic"])
def test_the_fixed_forms_fall_from_the_noisiest_group(kind: Weighting) -> None:
    found = TimestepWeights(kind, 4, 3.0)(torch.ones(4), torch.arange(4))
    assert bool((found.diff() > 0).all())
    assert float(found[-1]) == 4.0
    assert float(found[1]) == pytest.approx(2.5 if kind == "linear" else 1.75)


@pytest.mark.parametrize("kind", KINDS)
def test_one_group_or_no_loss_at_all_is_finite(kind: Weighting) -> None:
    for groups, losses in ((1, torch.ones(3)), (3, torch.zeros(3))):
        found = TimestepWeights(kind, groups, 20.0)(losses, torch.arange(3) % groups)
        assert bool(torch.isfinite(found).all())
        assert bool((found > 0).all())
