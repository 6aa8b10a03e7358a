"""What rows weigh in rounding by their timestep: the formulas by hand, and where the error goes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sweeping import chain, context, recorded, swept
from test_rounding import drawn, nearest, noise, problem, real, reconstruct
from torch import Tensor

from dmqfx.graph.registry import create
from dmqfx.graph.table import Codes, Sensitivity
from dmqfx.passes.round_weights import RoundWeights


def by_group(x: Tensor, weight: Tensor, group: Tensor, importance: Tensor) -> Tensor:
    """The mean error of the nearest codes in each of four groups, as it is felt."""
    error = x @ (nearest(weight) - weight).T
    losses = (error - error.mean(0)).square().sum(1) * importance
    return torch.stack([losses[group == g].mean() for g in range(4)]).double()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.sampled_from([0.0, 1.0, 5.0, 20.0]), st.booleans())
def test_adaptive_is_the_focal_weight_of_the_nearest_codes_errors(
    seed: int, strength: float, felt: bool
) -> None:
    """(1 - a group's share of all groups' errors)^strength, 1 in the mean."""
    x, weight = drawn(seed)
    group = torch.randint(0, 4, (len(x),), generator=torch.Generator().manual_seed(seed))
    x = x * torch.tensor([0.5, 1.0, 2.0, 3.0])[group][:, None]
    importance = torch.rand(len(x), generator=torch.Generator().manual_seed(seed)) + 0.5
    given_ = problem(x, weight, importance=importance if felt else None)
    importance = importance if felt else torch.ones(len(x))
    step = RoundWeights("gptq", weighting="adaptive", strength=strength, groups=4)
    errors = by_group(x, weight, group, importance)
    focal = ((1 - errors / errors.sum()) ** strength)[group]
    wanted = importance * (focal / focal.mean()).float()
    assert torch.allclose(step._weighed(given_, group), wanted, rtol=1e-3, atol=1e-6)


def test_linear_and_quadratic_fall_from_the_noisiest_group() -> None:
    x, weight = drawn(0)
    group = torch.arange(len(x)) % 4
    for kind, power in (("linear", 1), ("quadratic", 2)):
        step = RoundWeights("gptq", weighting=kind, strength=7.0, groups=4)  # type: ignore[arg-type]  # one of the words
        wanted = 1 + 7.0 * ((group + 1) / 4) ** power
        assert torch.allclose(step._weighed(problem(x, weight), group), wanted)


def test_the_error_goes_to_the_groups_that_weigh_less() -> None:
    x, weight = drawn(3, rows=800, columns=48)
    group = torch.arange(len(x)) % 2
    own = torch.where(torch.arange(48) % 2 == 0, 1.0, 0.1)  # each group has columns of its own
    x = x * torch.where(group[:, None] == 0, own, 1.1 - own)
    step = RoundWeights("gptq", weighting="quadratic", strength=100.0, groups=2)
    plain = problem(x, weight)
    early = replace(plain, importance=step._weighed(plain, group))
    late_rows = x[group == 1]
    uniform, weighed = (real(reconstruct(each)) - weight for each in (plain, early))
    assert noise(late_rows, weighed) < 0.95 * noise(late_rows, uniform)


def test_a_sweep_takes_the_weighting_with_and_without_what_the_output_feels() -> None:
    ctx = context(recorded(chain(3), 16))
    for before in ((), (("measure-sensitivity", {"rows": 8}),)):
        found = {}
        for kind in ("uniform", "adaptive"):
            rounding = ("round-weights", {"method": "gptq", "rows": 512, "weighting": kind, "groups": 4})
            after = swept(chain(3), ctx, (*before, ("fit-ranges", {}), rounding))
            found[kind] = {site: entry.packed for site, entry in after.table.of(Codes).items()}
            assert bool(after.table.of(Sensitivity)) == bool(before)
        assert found["uniform"].keys() == found["adaptive"].keys()
        assert any(
            not torch.equal(found["uniform"][site], found["adaptive"][site]) for site in found["uniform"]
        )


@pytest.mark.parametrize(("option", "value"), [("groups", 0), ("strength", -1.0), ("weighting", "early")])
def test_options_out_of_bounds_are_refused(option: str, value: object) -> None:
    with pytest.raises(Exception, match=f"{option} must be"):
        create("round-weights", {option: value})
