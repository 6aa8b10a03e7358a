"""Learned equivalent scales of one tensor and the layers that read it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dmqfx.numbers.equivalent import Layer, Learning, Scaling, View, learn, surrogate
from dmqfx.numbers.fitting import RowExtremes, Sample, percentile, search
from dmqfx.numbers.quant import QuantSpec, fake_quantize, params_from_range
from dmqfx.numbers.ranges import search_range
from dmqfx.numbers.scaledinput import Input
from dmqfx.numbers.weighting import TimestepWeights

WEIGHT = QuantSpec(4, "symmetric", per="channel")
GROUPS = 3


def problem(
    seed: int = 0,
    spec: QuantSpec | None = None,
    weight: QuantSpec = WEIGHT,
    outlier: float = 1.0,
    taps: int = 1,
    layers: int = 1,
    shifted: bool = False,
) -> Scaling:
    """Eight channels, of which the last is larger; three timestep groups."""
    drawn = torch.Generator().manual_seed(seed)
    spec = spec or QuantSpec(6, "affine", boundaries=(1.0, 2.0))
    group = torch.arange(300) % GROUPS
    values = torch.randn(300, 8, taps, generator=drawn) * (1 + group.view(-1, 1, 1))
    values[:, -1] *= outlier
    own = group if spec.boundaries else torch.zeros_like(group)
    parts = [values[own == k].movedim(1, 0).flatten(1) for k in range(int(own.max()) + 1)]
    given = Input(
        values.flatten(1),
        own,
        torch.stack([part.amin(1) for part in parts]),
        torch.stack([part.amax(1) for part in parts]),
        spec,
        taps,
        RowExtremes(values.amin(2), values.amax(2), own),
        2.0 ** -torch.randint(3, (len(parts), 8), generator=drawn) if shifted else None,
    )
    shapes = [(5, 8 * taps), (5, 5)]
    pairs = [[torch.randn(shape, generator=drawn) for shape in shapes] for _ in range(layers)]
    importance = 0.5 + torch.rand(300, generator=drawn)
    made = [Layer(given, own, weight, root, importance) for own, root in pairs]
    return Scaling([View(made, group)])


def with_inputs(of: Scaling, change: Callable[[Input], Input]) -> Scaling:
    """The same problem with its inputs changed."""
    (view,) = of.views
    return Scaling([replace(view, layers=[replace(each, given=change(each.given)) for each in view.layers])])


def fitted(given: Input, gamma: Tensor, felt: Tensor) -> tuple[Tensor, Tensor]:
    """The ends as fit-ranges finds them for x / gamma."""
    if given.spec.range == "minmax":
        return given.ends(gamma)
    if given.spec.range == "mse":
        columns, (low, high) = given.columns(gamma), given.ends(gamma)
        sample = Sample(given.values / columns, given.group, felt * columns.square())
        found = search((low[:, 0], high[:, 0]), sample, given.spec)
        return found[0][:, None], found[1][:, None]
    x = given.values.view(len(given.values), -1, given.taps) / gamma[:, None]
    ends = [[], []]  # type: list[list[Tensor]]
    for k in range(len(given.low)):
        own = x[given.group == k].flatten(1)
        if given.spec.range == "ema":
            seen = [own[0].min(), own[0].max()]
            for row in own[1:]:
                seen = [0.95 * a + 0.05 * b for a, b in zip(seen, (row.min(), row.max()), strict=True)]
        else:
            sample = Sample(own, torch.zeros(len(own), dtype=torch.int64), torch.ones(own.shape[1]))
            seen = [end[0] for end in percentile((own.min()[None], own.max()[None]), sample, 99.99)]
        for end, value in zip(ends, seen, strict=True):
            end.append(value)
    return torch.stack(ends[0])[:, None].clamp(max=0), torch.stack(ends[1])[:, None].clamp(min=0)


def deployed(of: Scaling, gamma: Tensor) -> Tensor:
    """The error in each row, by the arithmetic of the deployed graph."""
    return torch.stack([deployed_layer(each, gamma) for each in of.views[0].layers]).sum(0)


def deployed_layer(layer: Layer, gamma: Tensor) -> Tensor:
    """The error of one of the layers."""
    given, columns = layer.given, layer.given.columns(gamma)
    params = params_from_range(
        *fitted(given, gamma, layer.felt), given.spec, None if given.spec.per == "tensor" else 1
    )
    if given.finer is not None:
        finer = given.finer.repeat_interleave(given.taps, 1)
        params = replace(
            params, scale=params.scale * finer, zero_point=params.zero_point.expand(finer.shape), axis=1
        )
    if given.spec.per == "channel":
        params = replace(
            params,
            scale=params.scale.repeat_interleave(given.taps, 1),
            zero_point=params.zero_point.repeat_interleave(given.taps, 1),
        )
    x = given.values / columns
    rounded = fake_quantize(x, params, given.group if given.spec.boundaries else None)
    scaled = layer.weight * columns
    weight = fake_quantize(scaled, search_range(scaled, layer.spec), None)
    return ((rounded @ weight.T - x @ scaled.T) @ layer.root).square().sum(1)


@given(
    seed=st.integers(0, 2**31),
    grid=st.sampled_from(["affine", "symmetric"]),
    per=st.sampled_from(["tensor", "channel"]),
    edges=st.sampled_from([(), (1.0, 2.0)]),
    weight=st.sampled_from([WEIGHT, QuantSpec(4, "affine", per="tensor"), replace(WEIGHT, range="mse")]),
    taps=st.sampled_from([1, 4]),
    layers=st.integers(1, 2),
    how=st.sampled_from(["minmax", "mse", "ema", "percentile"]),
    shifted=st.booleans(),
)
def test_the_loss_is_the_error_of_the_deployed_layers(
    seed: int, grid: str, per: str, edges: tuple[float, ...], weight: QuantSpec, taps: int, layers: int, how: str,
    shifted: bool,
) -> None:  # fmt: skip
    """With ranges as fit-ranges finds them, and the steps of shifts where there are some."""
    how, shifted = (how, shifted) if per == "tensor" else ("minmax", False)
    spec = QuantSpec(6, grid, per=per, boundaries=edges, range=how)  # type: ignore[arg-type]  # of the words
    of = problem(seed, spec, weight, outlier=5.0, taps=taps, layers=layers, shifted=shifted)
    gamma = torch.rand(8, generator=torch.Generator().manual_seed(seed)) + 0.5
    found = errors(of, gamma)
    # A value in the middle between two codes may fall to either side.
    assert float((found - deployed(of, gamma)).norm() / found.norm()) < 2e-2


def test_a_range_that_is_cut_off_above_zero_still_contains_it() -> None:
    """All values but one are far above 0: what percentile leaves of the range would not contain what padding is."""
    values = torch.rand(4096, 8, generator=torch.Generator().manual_seed(0)) * 2 + 3
    values[7, 3] = -0.5
    spec = QuantSpec(6, "affine", range="percentile")
    given = Input(
        values, torch.zeros(len(values), dtype=torch.int64), values.amin(0)[None], values.amax(0)[None], spec
    )
    gamma, felt = torch.ones(8), torch.ones(8)
    found = params_from_range(*fitted(given, gamma, felt), spec, None)
    assert float(found.scale) == pytest.approx(5 / 63, rel=1e-2)  # of 0 to 5
    scale, zero = given.grid(gamma, given.covered(gamma, felt))
    torch.testing.assert_close(scale, found.scale, rtol=1e-5, atol=0)
    assert float(zero) == float(found.zero_point)


def errors(of: Scaling, gamma: Tensor) -> Tensor:
    """The error in each row, by no weight."""
    (view,) = of.views
    equal = [replace(each, importance=torch.ones_like(each.importance)) for each in view.layers]
    return replace(view, layers=equal).losses(gamma, view.shares(gamma), slice(None))


def test_each_layer_has_its_own_grid_of_the_tensor() -> None:
    """One reader has 8 bits and three timestep groups, the other 4 bits and one."""
    fine, coarse = problem(outlier=5.0), problem(outlier=5.0, spec=QuantSpec(4, "affine"))
    gamma = torch.linspace(0.5, 2, 8)
    (one,), (other,) = fine.views, coarse.views
    both = Scaling([replace(one, layers=[*one.layers, *other.layers])])
    assert torch.allclose(errors(both, gamma), errors(fine, gamma) + errors(coarse, gamma), rtol=1e-4)
    assert float(both.expected(gamma)) == pytest.approx(float(fine.expected(gamma) + coarse.expected(gamma)))
    assert float(errors(coarse, gamma).sum()) > 2 * float(errors(fine, gamma).sum())


def test_layers_of_two_windows_share_a_scale_and_both_count() -> None:
    """The outlier that either sees is moved into the weights of both."""
    point, window = problem(outlier=50.0), problem(seed=1, outlier=50.0, taps=4)
    both = Scaling([*point.views, *window.views])
    one = torch.ones(8)
    assert both.loss(one) == pytest.approx(point.loss(one) + window.loss(one))
    weights = TimestepWeights("uniform", GROUPS)
    gamma, _, loss = learn(both, {"one": one}, Learning(100), weights, torch.Generator())
    assert loss < both.loss(one) / 2
    assert point.loss(gamma) < point.loss(one) / 2
    assert window.loss(gamma) < window.loss(one) / 2
    found = surrogate(both, one)
    assert float(both.expected(found)) < float(both.expected(one)) / 2


@given(
    seed=st.integers(0, 2**31),
    outlier=st.sampled_from([1.0, 30.0]),
    kind=st.sampled_from(["uniform", "adaptive"]),
)
@settings(max_examples=15)
def test_what_is_learned_is_no_worse_than_any_start(seed: int, outlier: float, kind: str) -> None:
    of = problem(seed, outlier=outlier)
    starts = {"identity": torch.ones(8), "odd": torch.linspace(0.2, 5, 8)}
    weights = TimestepWeights(kind, GROUPS)  # type: ignore[arg-type]  # of the words
    gamma, _, loss = learn(of, starts, Learning(20, batch=64), weights, torch.Generator().manual_seed(1))
    assert loss == of.loss(gamma)
    assert loss <= min(of.loss(start) for start in starts.values())
    assert bool((gamma > 0).all())


def grown(given: Input, size: float, rows: RowExtremes) -> Input:
    """In another unit, as far as that is in reach."""
    sized = (each * size for each in (given.values, given.low, given.high))
    return replace(given, **dict(zip(("values", "low", "high"), sized, strict=True)), rows=rows).in_reach()


@pytest.mark.parametrize("unit", [2.0**60, 2.0**-80])
@pytest.mark.parametrize("how", ["minmax", "ema"])
def test_the_size_of_activations_does_not_matter(unit: float, how: str) -> None:
    """Squares of such errors are no float32; powers of two change no digit."""
    spec, found = QuantSpec(6, "affine", boundaries=(1.0, 2.0), range=how), list[Tensor]()  # type: ignore[arg-type]
    for size in (1.0, unit):
        of = problem(outlier=9.0, spec=spec)
        rows = of.views[0].layers[0].given.rows
        assert rows is not None
        larger = replace(rows, low=rows.low * size, high=rows.high * size)
        one = with_inputs(of, partial(grown, size=size, rows=larger))
        weights = TimestepWeights("adaptive", GROUPS)
        found.append(learn(one, {"one": torch.ones(8)}, Learning(30), weights, torch.Generator())[0])
    assert float((found[0] / found[1]).log().abs().max()) < 1e-2
    assert float(found[0].max()) > 1.5


def test_the_loss_of_all_rows_is_that_of_its_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    of, gamma = problem(outlier=5.0), torch.linspace(0.5, 2, 8)
    whole = of.loss(gamma)
    (view,) = of.views
    assert whole == pytest.approx(float(view.losses(gamma, view.shares(gamma), slice(None)).mean()))
    monkeypatch.setattr("dmqfx.numbers.equivalent._PORTION", 7)
    assert problem(outlier=5.0).loss(gamma) == pytest.approx(whole, rel=1e-5)
    assert float(problem(outlier=5.0).expected(gamma)) == pytest.approx(float(of.expected(gamma)), rel=1e-5)


def test_an_outlier_is_moved_into_the_weight() -> None:
    of = problem(outlier=50.0)
    starts = {"identity": torch.ones(8)}
    gamma, name, loss = learn(
        of, starts, Learning(100), TimestepWeights("uniform", GROUPS), torch.Generator()
    )
    assert name == "les from identity"
    assert gamma[-1] > 3 * gamma[:-1].max()
    assert loss < of.loss(torch.ones(8)) / 4


def test_without_iterations_the_best_start_is_taken() -> None:
    of = problem(outlier=50.0)
    starts = {"identity": torch.ones(8), "right": torch.tensor([1.0] * 7 + [10.0])}
    gamma, name, loss = learn(of, starts, Learning(0), TimestepWeights("uniform", 1), torch.Generator())
    assert (name, loss) == ("right", of.loss(starts["right"]))
    assert gamma is starts["right"]


def test_the_same_seed_learns_the_same_bits() -> None:
    def found() -> Tensor:
        weights = TimestepWeights("adaptive", GROUPS)
        return learn(problem(outlier=9.0), {"one": torch.ones(8)}, Learning(30), weights, torch.Generator())[
            0
        ]

    assert torch.equal(found(), found())


def test_the_expected_error_is_about_the_error() -> None:
    for outlier in (1.0, 20.0):
        of = problem(outlier=outlier, weight=replace(WEIGHT, bits=6))
        assert float(of.expected(torch.ones(8))) == pytest.approx(of.loss(torch.ones(8)), rel=0.35)


def doubled(layer: Layer) -> Layer:
    """In double precision."""
    given = layer.given
    wide = replace(given, values=given.values.double(), low=given.low.double(), high=given.high.double())
    weight, root, importance = (each.double() for each in (layer.weight, layer.root, layer.importance))
    return replace(layer, given=wide, weight=weight, root=root, importance=importance)


def test_the_expected_error_has_the_gradient_of_its_value() -> None:
    of = problem(outlier=4.0, taps=4, layers=2)
    (view,) = of.views
    wide = Scaling([replace(view, layers=list(map(doubled, view.layers)))])
    at = (
        torch.rand(8, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) + 0.5
    ).requires_grad_()
    # The zero point is rounded, but does not enter the expected error.
    assert torch.autograd.gradcheck(wide.expected, at)


def test_the_surrogate_lessens_the_error_without_trying_it() -> None:
    of = problem(outlier=50.0)
    gamma = surrogate(of, torch.ones(8))
    assert float(of.expected(gamma)) < float(of.expected(torch.ones(8))) / 4
    assert of.loss(gamma) < of.loss(torch.ones(8)) / 4
