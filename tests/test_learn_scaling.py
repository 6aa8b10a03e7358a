"""learn-scaling in the sweep: what the methods that look at activations make of a real UNet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from unittest.mock import patch

import pytest
import torch
from models import captured
from sweeping import context, output_noise, planned, recorded, swept

from dmqfx.checking.tablecheck import broken_claims
from dmqfx.checking.verify import verify
from dmqfx.errors import PassNotFoundError, PipelineError, RewriteError
from dmqfx.graph import ops
from dmqfx.graph.address import Site
from dmqfx.graph.facts import CORRECTED, FITTED, ROUNDED, SHIFTED, STEPPED
from dmqfx.graph.pipeline import Pipeline, run_step
from dmqfx.graph.program import Program
from dmqfx.graph.registry import create, pipeline
from dmqfx.graph.rewrite import Journal
from dmqfx.graph.table import Bias, ChannelScale, Codes, LayerPair, Shift
from dmqfx.numbers.equivalent import Layer, View, surrogate
from dmqfx.numbers.quant import QParams, QuantSpec
from dmqfx.numbers.scaledinput import Input
from dmqfx.passes import learn_scaling

MODEL = "plain"
QUICK = {"iterations": 12, "rows": 256, "batch": 64}
METHODS = ("les", "surrogate")


@pytest.fixture(autouse=True, scope="module")
def quickly() -> Iterator[None]:
    """The closed-form start in fewer steps; all that learns starts from it."""
    with patch.object(learn_scaling, "surrogate", partial(surrogate, iterations=20)):
        yield


@cache
def paired() -> Program:
    """The planned UNet with its pairs."""
    return pipeline([("pair-layers", {})]).run(planned(MODEL), context(recorded(planned(MODEL), 8)))


@cache
def learned(method: str) -> Program:
    program = paired()
    return swept(program, context(recorded(program, 16)), [("learn-scaling", {"method": method, **QUICK})])


def noise(program: Program) -> float:
    data = recorded(program, 16)
    rounded = swept(program, context(data), [("fit-ranges", {}), ("round-weights", {"method": "nearest"})])
    return output_noise(rounded, recorded(program, 16, seed=1))


@pytest.mark.parametrize("method", METHODS)
def test_every_pair_gets_a_scale_of_its_channels_or_a_reason(method: str) -> None:
    program = learned(method)
    scales, pairs = program.table.of(ChannelScale), program.table.of(LayerPair)
    assert scales
    assert scales.keys() <= pairs.keys()
    refused = {refusal.at for refusal in program.log[-1].refused}
    assert {site.at for site in pairs.keys() - scales.keys()} == refused
    for scale in scales.values():
        assert bool((scale.gamma > 0).all())
        assert float(scale.gamma.log().mean()) == pytest.approx(0, abs=1e-4)


def test_learned_scales_lessen_the_noise_of_the_output() -> None:
    assert noise(learned("les")) < noise(paired())


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("weighting", ("uniform", "quadratic")),
        pytest.param("strength", (1.0, 40.0), marks=pytest.mark.slow),
    ],
)
def test_what_timesteps_weigh_while_learning_decides_about_the_scale(
    option: str, values: tuple[object, object]
) -> None:
    data = context(recorded(paired(), 16))
    one, other = (
        swept(paired(), data, [("learn-scaling", {"method": "les", **QUICK, option: value})]).table.of(
            ChannelScale
        )
        for value in values
    )
    both = one.keys() & other.keys()
    assert both
    assert any(not torch.equal(one[site].gamma, other[site].gamma) for site in both)


def test_from_identity_a_scale_goes_no_further_than_its_steps() -> None:
    """Adam on log gamma moves by its rate a step; the closed forms of these layers lie further away."""
    few = {"method": "les", **QUICK, "iterations": 3, "rate": 0.01}
    data = context(recorded(paired(), 16))
    near = swept(paired(), data, [("learn-scaling", {**few, "start": "identity"})]).table.of(ChannelScale)
    far = swept(paired(), data, [("learn-scaling", few)]).table.of(ChannelScale)
    assert near
    assert all(scale.gamma.log().abs().max() < 0.05 for scale in near.values())
    assert any(scale.gamma.log().abs().max() > 0.2 for scale in far.values())


def test_shifts_that_were_voted_on_and_ranges_of_weights_count_in_the_loss() -> None:
    """The same rows and start; only what is rounded differs."""
    data, found = context(recorded(paired(), 16)), list[dict[Site, ChannelScale]]()
    fitted = swept(paired(), data, [("fit-ranges", {})])
    voted = swept(fitted, data, [("vote-shifts", {"where": "all", "agree": 0.3})])
    for before, more in ((fitted, {}), (voted, {}), (fitted, {"weights": "extremes"})):
        options = {"method": "les", **QUICK, **more}
        found.append(swept(before, data, [("learn-scaling", options)]).table.of(ChannelScale))
    plain, shifted, extremes = found
    differ = {s for s in plain.keys() & shifted.keys() if not torch.equal(plain[s].gamma, shifted[s].gamma)}
    assert differ & set(voted.table.of(Shift))  # and what comes behind sees other inputs
    assert any(not torch.equal(plain[s].gamma, extremes[s].gamma) for s in plain.keys() & extremes.keys())


def test_the_last_step_counts_even_where_it_finds_no_scale() -> None:
    """The scales of the step before do not stay beside a refusal; one that makes no steps makes none."""
    data = context(recorded(paired(), 16))
    none = {"method": "les", **QUICK, "start": "identity", "iterations": 0}
    scaled = swept(paired(), data, [("learn-scaling", {"method": "surrogate", "rows": 256})])
    scales = scaled.table.of(ChannelScale)
    assert scales
    once = swept(scaled, data, [("fit-ranges", {}), ("round-weights", {})])
    again = swept(once, data, [("learn-scaling", none)])
    assert not again.table.of(ChannelScale)
    assert len(again.log[-1].refused) >= len(scales)
    for at in scales:
        for reader in _pair(once, at).readers:
            assert once.table.get(reader, QParams) is not None
            assert again.table.get(reader, QParams) is None
            assert again.table.get(Site(reader.at, "weight"), Codes) is None
    idle = replace(data, journal=Journal(fuel=0))
    assert run_step(create("learn-scaling", none), once, idle).table.of(ChannelScale).keys() == scales.keys()


def test_scales_that_are_not_applied_do_not_get_into_codes_in_silence() -> None:
    """Codes of W gamma beside steps of x / gamma, and nobody divides x: an error that says what is missing."""
    program = learned("les")
    fitted = swept(program, context(recorded(program, 8)), [("fit-ranges", {}), ("round-weights", {})])
    told = "insert-qdq, comes too late: 'learned'.* put apply-scaling before it"
    with pytest.raises(PipelineError, match=told):
        swept(fitted, context(recorded(program, 8)), [("insert-qdq", {})])
    swept(fitted, context(recorded(program, 8)), [("apply-scaling", {}), ("insert-qdq", {})])
    around = [("insert-observers", {}), ("freeze-observers", {}), ("fit-ranges", {}), ("round-weights", {})]
    with pytest.raises(RewriteError, match="nobody applied it; run apply-scaling before"):
        swept(program, context(recorded(program, 8)), [*around, ("insert-qdq", {})])


def test_what_was_decided_before_a_layer_was_scaled_is_forgotten() -> None:
    """Its codes are those of W and its steps those of x, not of W gamma and x / gamma."""
    rounding = [
        ("fit-ranges", {}),
        ("vote-shifts", {"where": "all", "agree": 0.3}),
        ("round-weights", {"method": "gptq"}),
    ]
    data = context(recorded(paired(), 16))
    before = swept(paired(), data, rounding)
    after = swept(before, data, [("learn-scaling", {"method": "les", **QUICK})])
    scaled = {site for at in after.table.of(ChannelScale) for site in _pair(after, at).readers}
    rounded = {site for site in before.table.of(QParams) if site.arg == "input"}
    assert 0 < len(scaled & rounded) < len(rounded)  # some pair is refused
    for kind in (QParams, Shift, Codes, Bias):
        for site in before.table.of(kind):
            stays = Site(site.at, "input") not in scaled
            assert (after.table.get(site, kind) is not None) == stays, (kind, site)
    assert not {ROUNDED, FITTED, SHIFTED, CORRECTED, STEPPED} & after.facts
    assert list(broken_claims(after)) == []


def _pair(program: Program, at: Site) -> LayerPair:
    pair = program.table.get(at, LayerPair)
    assert pair is not None
    return pair


@pytest.mark.parametrize("method", [pytest.param("les", marks=pytest.mark.slow), "surrogate"])
def test_the_verifier_agrees(method: str) -> None:
    program = paired()
    step = create("learn-scaling", {"method": method, **QUICK})
    verify(program, step, context(recorded(program, 8)))


def test_the_same_seed_learns_the_same_bits_and_another_one_does_not() -> None:
    program = paired()

    def found(seed: int) -> dict[Site, ChannelScale]:
        ctx = context(recorded(program, 16), seed=seed, journal=Journal())
        return swept(program, ctx, [("learn-scaling", {"method": "les", **QUICK})]).table.of(ChannelScale)

    first, again, other = learned("les").table.of(ChannelScale), found(0), found(1)
    assert all(torch.equal(scale.gamma, again[site].gamma) for site, scale in first.items())
    assert any(
        site not in other or not torch.equal(scale.gamma, other[site].gamma) for site, scale in first.items()
    )


def test_the_closed_form_alone_asks_for_ranges() -> None:
    program = paired()
    with pytest.raises(PipelineError, match="learn-scaling, requires 'calibrated'"):
        Pipeline((create("learn-scaling"),)).check(program)
    Pipeline((create("learn-scaling", {"method": "les"}),)).check(program)


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("rows", 0, "rows must be at least 1, not 0"),
        ("batch", 0, "batch must be at least 1, not 0"),
        ("groups", 0, "groups must be at least 1, not 0"),
        ("iterations", -1, "iterations must be at least 0, not -1"),
        ("rate", 0.0, "rate must be above 0 and strength at least 0, not 0.0 and 20.0"),
        ("strength", -1.0, "rate must be above 0 and strength at least 0, not 0.05 and -1.0"),
        (
            "weighting",
            "late",
            "option weighting must be one of uniform, linear, quadratic, adaptive, focal, published",
        ),
    ],
)
def test_options_out_of_range_are_refused(option: str, value: object, told: str) -> None:
    with pytest.raises(PassNotFoundError, match=told):
        create("learn-scaling", {"method": "les", option: value})


@pytest.mark.parametrize("windows", [[2, 1], [1, 1, 1]])
def test_a_layer_counts_by_its_positions_whatever_else_sees_the_tensor_so(windows: Sequence[int]) -> None:
    """Layers alike: how they are spread over windows changes nothing; one with half the positions counts half."""
    gamma = torch.linspace(0.5, 2, 8)
    together, apart = (
        learn_scaling._weighed(seen_by(own), [4] * len(own)) for own in ([sum(windows)], windows)
    )
    assert apart.loss(gamma) == pytest.approx(together.loss(gamma), rel=1e-5)
    assert float(apart.expected(gamma)) == pytest.approx(float(together.expected(gamma)), rel=1e-5)
    fewer = learn_scaling._weighed(seen_by([1, 1]), [4, 2])
    first, second = (view.loss(gamma) for view in fewer.views)
    assert first == pytest.approx(2 * second, rel=1e-5)


def seen_by(windows: Sequence[int]) -> list[View]:
    """So many layers of one weight and the same rows, by window."""
    drawn = torch.Generator().manual_seed(0)
    x, weight = torch.randn(64, 8, generator=drawn), torch.randn(4, 8, generator=drawn)
    group, spec = torch.zeros(64, dtype=torch.int64), QuantSpec(4, "symmetric", per="channel")
    given = Input(x, group, x.amin(0)[None], x.amax(0)[None], QuantSpec(6, "affine"))
    return [
        View([Layer(given, weight, spec, torch.eye(4), torch.ones(64))] * count, group) for count in windows
    ]


def test_layers_that_look_at_a_tensor_through_other_windows_share_a_scale() -> None:
    """The arm of a skip, and the downsampling convolution that reads the same tensor."""
    steps = [
        ("canonicalize", {}),
        ("flag-skips", {}),
        ("split-skips", {}),
        ("plan-sites", {}),
        ("pair-layers", {}),
    ]
    program = pipeline(steps).run(captured(MODEL)[1], context(recorded(planned(MODEL), 8)))
    apart = {
        at: pair for at, pair in program.table.of(LayerPair).items() if len(windows_of(program, pair)) > 1
    }
    assert apart
    given = context(recorded(program, 2))
    found = swept(program, given, [("learn-scaling", {"method": "surrogate", "rows": 64})])
    assert apart.keys() <= found.table.of(ChannelScale).keys()


def windows_of(program: Program, pair: LayerPair) -> set[object]:
    """The strides and kernels of the layers of a pair."""
    nodes = [program.node(site.at) for site in pair.readers]
    return {
        (str(ops.args(node).get("stride")), ops.tensor(node, "weight").meta["val"].shape[2:])
        for node in nodes
    }
