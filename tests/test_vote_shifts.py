"""vote-shifts: from calibration rows to integers, with a test for each way in which the published code goes wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import permutations
from typing import Literal

import pytest
import torch
from handmade import program_of
from planting import SWEPT, context, program_before
from torch import Tensor, fx
from toys import rows as toy_rows

from dmqfx.calibration.calibration import Calibration
from dmqfx.calibration.rows import Column, Rows
from dmqfx.checking.verify import verify
from dmqfx.errors import CalibrationError, PassNotFoundError, PipelineError
from dmqfx.graph import ops, registry
from dmqfx.graph.address import Site
from dmqfx.graph.journal import Journal
from dmqfx.graph.pipeline import PassContext, run_step
from dmqfx.graph.program import Program
from dmqfx.graph.registry import create
from dmqfx.graph.table import ChannelScale, LayerPair, Planned, Range, Shift, SkipArm, Table
from dmqfx.numbers.quant import QParams
from dmqfx.policy.policy import Policy
from dmqfx.runtime.unet import CompiledUNet
from dmqfx.seeing.report import Report
from dmqfx.seeing.show import show, why
from dmqfx.storage import store
from dmqfx.storage.tablefile import read_table, write_table
from dmqfx.sweep.chunks import chunked
from dmqfx.sweep.rows import Batch
from dmqfx.sweep.turn import Turn
from dmqfx.sweep.values import Pair
from dmqfx.sweep.walk import Walk

aten = torch.ops.aten
CONV, LINEAR = Site.parse("layer/conv2d:input"), Site.parse("tokens/linear:input")
EVEN = [1.0, 0.47, 0.235, 0.117]  # what a step of 1, 1/2, 1/4, 1/8 reaches, and a little less


@cache
def uneven() -> Program:
    """conv(sample) and linear(its positions as tokens): two layers that read the same four channels."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"layer.weight": (6, 4, 3, 3), "layer.bias": (6,), "tokens.weight": (5, 4), "tokens.bias": (5,)}
    constants = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    graph = fx.Graph()
    call, (sample, _) = graph.call_function, (graph.placeholder("sample"), graph.placeholder("timestep"))
    held = {name: graph.get_attr(name) for name in constants}
    conv = call(aten.conv2d.default, (sample, held["layer.weight"], held["layer.bias"], [1, 1], [1, 1]))
    tokens = call(aten.transpose.int, (call(aten.flatten.using_ints, (sample, 2)), 1, 2))
    linear = call(aten.linear.default, (tokens, held["tokens.weight"], held["tokens.bias"]))
    conv.meta["address"], linear.meta["address"] = CONV.at, LINEAR.at
    graph.output(call(aten.add.Tensor, (conv, call(aten.mean.default, (linear,)))))
    program = program_of(graph, constants)
    return registry.pipeline([("canonicalize", {}), ("flag-skips", {})]).run(program, PassContext())


def calibration(sample: Tensor, timestep: Sequence[float]) -> Calibration:
    """Rows of one trajectory."""
    each = torch.arange(len(sample))
    columns = {"sample": Column(sample, each), "timestep": Column(torch.tensor(timestep), each)}
    return Calibration((Rows(columns, torch.zeros_like(each), each),))


def of_size(*sizes: Sequence[float], height: int = 6, width: int = 8, seed: int = 0) -> Tensor:
    """Rows whose channels are uniform in +-size, with the ends hit."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(len(sizes), 4, height, width, generator=generator) * 2 - 1
    x[:, :, 0, 0], x[:, :, 0, 1] = 1, -1
    return x * torch.tensor(sizes)[:, :, None, None]


def policy(groups: object = (500.0,), **more: object) -> Policy:
    default = {
        "weight": {"bits": 4},
        "input": {"bits": 8, "groups": list(groups) if isinstance(groups, tuple) else groups, **more},
    }
    return Policy.load(
        {"schema": "dmqfx.policy/1", "name": "uneven", "default": default, "pipeline": ["plan-sites"]}
    )


def fitted(data: Calibration, policy: Policy, program: Program | None = None) -> tuple[Program, PassContext]:
    """Planned, and with the ranges of the rows; and the context for what follows."""
    ctx = PassContext(policy, data)
    steps = registry.pipeline([("plan-sites", {}), ("fit-ranges", {})])
    return steps.run(program or uneven(), ctx), ctx


def voted(data: Calibration, policy: Policy, **options: object) -> Program:
    """The program behind the vote at every site."""
    program, ctx = fitted(data, policy)
    return run_step(create("vote-shifts", {"where": "all", **options}), program, ctx)


def exponents(program: Program, site: Site = CONV) -> list[list[int]]:
    shift = program.table.get(site, Shift)
    assert shift is not None
    return shift.exponent.tolist()


def refusals(program: Program) -> Mapping[str, str]:
    return {str(refusal.at): refusal.reason for refusal in program.log[-1].refused}


EARLY, LATE = EVEN, EVEN[::-1]
BOTH = calibration(of_size(EARLY, LATE, EARLY, LATE, EARLY, LATE), [900.0, 100.0, 800.0, 0.0, 500.0, 499.0])


# --- what is voted


def test_a_channel_gets_the_step_that_fits_it_in_each_timestep_group() -> None:
    assert exponents(voted(BOTH, policy())) == [[0, 1, 2, 3], [3, 2, 1, 0]]


def test_channels_of_a_linear_layer_lie_on_its_last_axis() -> None:
    """The published code takes axis 1, which are tokens; here there are as many tokens as channels, too."""
    assert exponents(voted(BOTH, policy()), LINEAR) == [[0, 1, 2, 3], [3, 2, 1, 0]]
    square = of_size(*[EARLY, LATE] * 12, height=2, width=2)
    found = voted(calibration(square, [900.0, 100.0] * 12), policy(), agree=0.5)
    assert exponents(found, LINEAR) == exponents(found, CONV) == [[0, 1, 2, 3], [3, 2, 1, 0]]


def test_the_site_keeps_its_own_scale_and_channels_divide_it() -> None:
    program, ctx = fitted(BOTH, policy())
    result = run_step(create("vote-shifts", {"where": "all"}), program, ctx)
    assert result.table.get(CONV, QParams) is program.table.get(CONV, QParams)
    shift = result.table.get(CONV, Shift)
    assert shift is not None
    assert shift.factor.tolist() == [[0.125, 0.25, 0.5, 1.0], [1.0, 0.5, 0.25, 0.125]]


def test_one_vote_may_be_shared_by_all_groups() -> None:
    constant = calibration(of_size(EARLY, EARLY, EARLY, LATE), [900.0, 800.0, 700.0, 100.0])
    assert exponents(voted(constant, policy(), shared=True, agree=0.7)) == [[3, 2, 1, 0]] * 2
    assert "no channel wants" in refusals(voted(constant, policy(), shared=True))[str(CONV.at)]


def test_the_least_error_over_all_rows_is_the_ablation() -> None:
    """One row in ten is an outlier: nine votes outvote it, but not its error."""
    sizes = [[1.0, 0.1, 0.1, 0.1]] * 9 + [[1.0, 1.0, 0.1, 0.1]]
    data = calibration(of_size(*sizes), [float(100 * k) for k in range(10)])
    assert exponents(voted(data, policy(groups=1)))[0][1] == 0
    assert exponents(voted(data, policy(groups=1), method="mse"))[0][1] == 3
    assert exponents(voted(data, policy(groups=1), agree=0.95))[0][1] == 3


@pytest.mark.parametrize("largest", [1, 2, 5])
def test_the_finest_step_is_as_fine_as_was_said(largest: int) -> None:
    data = calibration(of_size([1.0, 0.03, 0.03, 0.03]), [0.0])
    result = voted(data, policy(groups=1), largest=largest)
    assert exponents(result) == [[largest, 0, 0, 0]]
    assert result.table.get(CONV, Shift).factor.tolist() == [[1.0] + [2.0**-largest] * 3]


def test_a_group_without_rows_takes_the_vote_of_the_nearest() -> None:
    found = voted(BOTH, policy(groups=(500.0, 950.0, 999.0)))
    assert exponents(found) == [[0, 1, 2, 3], [3, 2, 1, 0], [3, 2, 1, 0], [3, 2, 1, 0]]


# --- published bugs


def test_ranges_and_votes_of_one_group_are_those_of_its_rows_alone() -> None:
    """There, ranges and shifts of a group begin with what is left of the group before."""
    whole = voted(BOTH, policy())
    for group, rows in enumerate(([1, 3, 5], [0, 2, 4])):
        alone = Calibration((BOTH.groups[0].take(torch.tensor(rows)),))
        single = voted(alone, policy())
        for site in (CONV, LINEAR):
            assert exponents(single, site)[group] == exponents(whole, site)[group]
            for entry in ("scale", "zero_point"):
                one, all_ = (getattr(p.table.get(site, QParams), entry)[group] for p in (single, whole))
                assert torch.equal(one, all_)


def test_voting_does_not_see_the_shifts_of_a_vote_before() -> None:
    once, ctx = voted(BOTH, policy()), PassContext(policy(), BOTH)
    again = run_step(create("vote-shifts", {"where": "all"}), once, ctx)
    assert exponents(again) == exponents(once)
    assert torch.equal(again.table.get(CONV, QParams).scale, once.table.get(CONV, QParams).scale)


def test_the_last_vote_counts_even_where_no_channel_wants_a_finer_step() -> None:
    """What the vote before wanted does not stay beside a refusal."""
    once, ctx = voted(BOTH, policy()), PassContext(policy(), BOTH)
    assert CONV in once.table.of(Shift)
    alike = replace(ctx, calibration=calibration(of_size([1.0] * 4, [1.0] * 4), [100.0, 900.0]))
    again = run_step(create("vote-shifts", {"where": "all"}), once, alike)
    assert refusals(again).keys() == {str(site.at) for site in (CONV, LINEAR)}
    assert not again.table.of(Shift)
    idle = run_step(create("vote-shifts", {"where": "all"}), once, replace(alike, journal=Journal(fuel=0)))
    assert idle.table.of(Shift).keys() == once.table.of(Shift).keys()


def test_shifts_that_were_voted_on_other_steps_go_with_them() -> None:
    once, ctx = voted(BOTH, policy()), PassContext(policy(), BOTH)
    assert CONV in once.table.of(Shift)
    assert not run_step(create("fit-ranges"), once, ctx).table.of(Shift)


@pytest.mark.parametrize("chunk", [1, 2, 5, 16])
def test_a_batch_may_mix_timesteps_and_rows_may_come_in_any_order(chunk: int) -> None:
    """There, the first row's timestep is taken for the whole batch."""
    order = torch.randperm(6, generator=torch.Generator().manual_seed(chunk))
    program, ctx = fitted(Calibration((BOTH.groups[0].take(order),)), policy())
    result = run_step(create("vote-shifts", {"where": "all"}), program, replace(ctx, chunk=chunk))
    assert exponents(result) == [[0, 1, 2, 3], [3, 2, 1, 0]]


def test_the_second_arm_has_the_range_of_every_row() -> None:
    """There, only the first arm's range is followed; the second has that of the last batch."""
    program = program_before("vote-shifts", "shifts")
    held = read_by(program, context("shifts"))
    assert set(held) >= set(program.table.of(SkipArm))
    for site in program.table.of(SkipArm):
        rows = torch.cat([batch.quantized for batch in held[site]])
        time = torch.cat([batch.timestep for batch in held[site]])
        group = (time[:, None] >= torch.tensor([250.0, 500.0, 750.0])).sum(1)
        channels = [rows[group == g].transpose(0, 1).flatten(1) for g in range(4)]
        known = program.table.get(site, Range)
        assert known is not None
        torch.testing.assert_close(known.low, torch.stack([each.amin(1) for each in channels]))
        torch.testing.assert_close(known.high, torch.stack([each.amax(1) for each in channels]))


@pytest.mark.parametrize("kind", ["ema", "minmax"])
def test_the_steps_of_both_arms_are_those_of_their_own_rows(kind: Literal["ema", "minmax"]) -> None:
    """What is deployed, not what was observed: the published code averages the first arm's range alone."""
    program = program_before("fit-ranges", "shifts")
    plans = program.table.of(Planned)
    arms = {site: plans[site] for site in program.table.of(SkipArm)}
    specs = {site: plan.spec for site, plan in arms.items() if plan.spec is not None}
    assert len(specs) == len(arms) > 1
    changed = {site: replace(arms[site], spec=replace(spec, range=kind)) for site, spec in specs.items()}
    start, ctx = program.with_table(program.table.put_all(changed)), context("shifts")
    found = run_step(create("fit-ranges", {"momentum": 0.5}), start, ctx).table
    held = read_by(start.with_table(found), ctx)
    for site, spec in specs.items():
        rows = torch.cat([batch.quantized for batch in held[site]]).flatten(1)
        time = torch.cat([batch.timestep for batch in held[site]])
        group, params = (time[:, None] >= torch.tensor(spec.boundaries)).sum(1), found.get(site, QParams)
        assert params is not None
        for g in group.unique().tolist():
            own = rows[group == g]
            orders = (
                permutations(range(len(own))) if kind == "ema" else [()]
            )  # rows are averaged in a random one
            ends = [(averaged(own[list(o)].amin(1)), averaged(own[list(o)].amax(1))) for o in orders if o]
            ends = ends or [(float(own.min()), float(own.max()))]
            wanted = [(max(high, 0.0) - min(low, 0.0)) / (params.qmax - params.qmin) for low, high in ends]
            assert min(abs(float(params.scale[g]) / each - 1) for each in wanted) < 1e-4


def averaged(values: Tensor) -> float:
    """An exponential average, momentum one half, that begins with the first value."""
    found = float(values[0])
    for each in values[1:].tolist():
        found = 0.5 * found + 0.5 * each
    return found


def read_by(program: Program, ctx: PassContext) -> dict[Site, list[Batch]]:
    """What arrives at every planned site in a sweep, all of it held."""
    found: dict[Site, list[Batch]] = {}

    def visit(turn: Turn) -> Table:
        for reader in turn.readers:
            found[reader.site] = list(turn.batches)
        return turn.table

    data = ctx.calibration
    assert data is not None
    Walk(program, chunked(data, program, 4), memory=2**30, total=len(data)).run(visit)
    return found


def test_votes_are_on_the_input_as_it_is_divided_by_its_equivalent_scale() -> None:
    data = calibration(of_size([1.0, 1.0, 0.235, 0.235], [1.0, 1.0, 0.235, 0.235]), [100.0, 900.0])
    program, ctx = fitted(data, policy())
    gamma = torch.tensor([1.0, 2.1, 0.25, 2.0])
    pair = LayerPair((CONV, LINEAR), None, "an input feeds them")
    table = program.table.put(CONV, pair).put(CONV, ChannelScale(gamma))
    pending = registry.pipeline([("fit-ranges", {}), ("vote-shifts", {"where": "all"})]).run(
        program.with_table(table), ctx
    )
    assert exponents(pending) == exponents(pending, LINEAR) == [[3, 2, 3, 0]] * 2


# --- what is refused


def test_channels_that_are_alike_keep_the_sites_own_step_and_are_refused() -> None:
    program, ctx = fitted(calibration(of_size([1.0] * 4, [1.0] * 4), [100.0, 900.0]), policy())
    result = run_step(create("vote-shifts", {"where": "all"}), program, ctx)
    assert refusals(result) == {
        str(site.at): "no channel wants a finer step by enough votes" for site in (CONV, LINEAR)
    }
    assert list(result.table) == list(program.table)
    by_error = run_step(create("vote-shifts", {"where": "all", "method": "mse"}), program, ctx)
    assert refusals(by_error)[str(CONV.at)] == "no channel wants a finer step"


def test_a_scale_of_each_channel_is_not_shifted() -> None:
    result = voted(BOTH, policy(per="channel"))
    assert set(refusals(result).values()) == {"every channel has a scale of its own already"}


def test_steps_that_cannot_be_divided_are_not() -> None:
    result = voted(calibration(of_size([1.0, 0.1, 0.1, 0.1]) * 1e-36, [100.0]), policy(groups=1))
    assert set(refusals(result).values()) == {"its steps are too small to be divided"}


def test_numbers_that_are_not_finite_are_an_error_that_names_where_they_came_from() -> None:
    graph = fx.Graph()
    sample, _ = graph.placeholder("sample"), graph.placeholder("timestep")
    root = graph.call_function(aten.sqrt.default, (sample,))
    layer = graph.call_function(aten.conv2d.default, (root, graph.get_attr("layer.weight")))
    layer.meta["address"] = CONV.at
    graph.output(layer)
    made = program_of(graph, {"layer.weight": torch.ones(1, 4, 1, 1)})
    flagged = registry.pipeline([("canonicalize", {}), ("flag-skips", {})]).run(made, PassContext())
    good = of_size(EARLY, LATE).abs()
    program, ctx = fitted(calibration(good, [900.0, 100.0]), policy(), flagged)
    good[1, 2, 3, 3] = -1.0  # which has no root
    bad = replace(ctx, calibration=calibration(good, [900.0, 100.0]))
    for name, options in (("fit-ranges", {}), ("vote-shifts", {"where": "all"})):
        with pytest.raises(CalibrationError, match=r"(block/sqrt|layer/conv2d:input): .* not finite"):
            run_step(create(name, options), program, bad)


def test_only_what_a_skip_feeds_is_shifted_unless_all_is_said() -> None:
    program, ctx = fitted(BOTH, policy())
    assert run_step(create("vote-shifts"), program, ctx).log[-1].applied == ()
    chosen = program_before("round-weights", "shifts")
    log = chosen.log[-1]
    assert {str(each.at) for each in (*log.applied, *log.refused)} == {
        str(site.at) for site in chosen.table.of(SkipArm)
    }
    unflagged = replace(program, facts=frozenset(f for f in program.facts if f.name != "flagged"))
    with pytest.raises(PipelineError, match="requires 'flagged'"):
        registry.pipeline([("vote-shifts", {})]).run(unflagged, ctx)


def test_sites_are_chosen_by_pattern() -> None:
    result = voted(BOTH, policy(), at="tokens/*")
    assert set(result.table.of(Shift)) == {LINEAR}
    with pytest.raises(PipelineError, match=r"at: tokns/\* fits no input that is to be quantized"):
        voted(BOTH, policy(), at="tokns/*")
    told = r"at: tokens/\* fits no input that a long skip feeds\n  mend: where: all"
    with pytest.raises(PipelineError, match=told):
        voted(BOTH, policy(), at="tokens/*", where="skips")


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"agree": 1.5}, "agree must be between 0 and 1, not 1.5"),
        ({"largest": 8}, "largest must be from 1 to 7, not 8"),
        ({"largest": 0}, "largest must be from 1 to 7, not 0"),
        ({"method": "median"}, "option method must be one of vote, mse"),
        ({"where": "nowhere"}, "option where must be one of skips, all"),
        ({"at": "a{b"}, "fits no address"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused(option: Mapping[str, object], words: str) -> None:
    with pytest.raises(PassNotFoundError, match=words):
        create("vote-shifts", option)


def test_a_shift_needs_scales() -> None:
    with pytest.raises(PipelineError, match=r"vote-shifts, requires 'fitted'.*put fit-ranges before it"):
        registry.pipeline([("plan-sites", {}), ("vote-shifts", {})]).run(
            uneven(), PassContext(policy(), BOTH), providers=tuple(registry.passes().values())
        )


# --- what becomes of it


def finished(program: Program, ctx: PassContext) -> Program:
    """Rounded and quantized."""
    return registry.pipeline([("round-weights", {"method": "nearest"}), ("insert-qdq", {})]).run(program, ctx)


def test_readers_of_one_tensor_with_other_shifts_do_not_share_a_quantize() -> None:
    program, ctx = fitted(BOTH, policy())
    both = run_step(create("vote-shifts", {"where": "all"}), program, ctx)
    one = run_step(create("vote-shifts", {"where": "all", "at": "layer/*"}), program, ctx)
    assert len(list(finished(one, ctx).calls("quantize"))) == 2
    assert len(list(finished(both, ctx).calls("quantize"))) == 2  # maps and tokens: two tensors
    shared = Site.parse("layer/dequantize~insert-qdq.1:shift")
    assert finished(both, ctx).constant_at(shared).dtype == torch.uint8


@pytest.mark.parametrize("pending", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_sweep_computes_what_the_compiled_program_will(pending: bool) -> None:
    """Scaled in the graph already, or (pending) about to be, split and shifted, in mixed timestep groups."""
    ctx = replace(context("shifts"), chunk=5)
    names = list(SWEPT)
    if pending:
        names = [name for name in names if name not in ("apply-scaling", "absorb-scaling")]
        names.insert(names.index("insert-qdq"), "apply-scaling")
    steps = [(name, {"agree": 0.5} if name == "vote-shifts" else {}) for name in names[:-1]]
    before = registry.pipeline(steps).run(program_before("canonicalize"), ctx)
    assert len(before.table.of(Shift)) >= 2
    walk = Walk(before, chunked(toy_rows(), before, 5), memory=2**30, total=len(toy_rows()))
    outputs: list[Pair] = []
    walk.run(lambda turn: turn.table, outputs)
    after = registry.pipeline([("insert-qdq", {}), ("lower-simulate", {})]).run(before, ctx)
    for inputs, pair in zip(toy_rows().batches(5, before.inputs), outputs, strict=True):
        result, real, quantized = after(**inputs), pair.real, pair.quantized
        assert isinstance(result, Tensor)
        assert float((result - quantized).norm() / quantized.norm()) < 1e-5
        assert float((real - quantized).norm() / quantized.norm()) > 1e-3


def test_the_integer_layers_are_exact_and_the_vote_is_what_the_rows_say() -> None:
    program, ctx = fitted(BOTH, policy())
    assert verify(program, create("vote-shifts", {"where": "all"}), ctx).error == 0
    result = finished(run_step(create("vote-shifts", {"where": "all"}), program, ctx), ctx)
    assert verify(result, create("lower-reference"), ctx).error < 1e-10
    lowered = run_step(create("lower-reference"), result, ctx)
    for name in ("qconv2d", "qlinear"):
        (layer,) = lowered.calls(name)
        assert ops.args(layer)["shift"] is not None


@pytest.mark.parametrize("options", [{"method": "mse"}, {"shared": True, "agree": 0.4}, {"largest": 5}])
def test_every_way_to_vote_is_counted_anew(options: Mapping[str, object]) -> None:
    program, ctx = fitted(BOTH, policy())
    assert verify(program, create("vote-shifts", {"where": "all", **options}), ctx).error == 0


def test_finer_steps_make_the_input_of_a_layer_more_exact() -> None:
    program, ctx = fitted(BOTH, policy())
    shifted = run_step(create("vote-shifts", {"where": "all"}), program, ctx)
    (inputs,) = BOTH.batches(6, program.inputs)
    errors = []
    for each in (program, shifted):
        result = finished(each, ctx)
        (first, *_) = [
            n for n in result.calls("dequantize") if n.meta["val"].dim() == 4 and n.meta["val"].shape[1] == 4
        ]
        keep = fx.Interpreter(result.gm, garbage_collect_values=False)
        keep.run(*(inputs[i.name] for i in result.inputs.inputs))
        errors.append(float((keep.env[first] - inputs["sample"]).square().mean()))
    assert errors[1] < errors[0] / 2


def test_weights_that_shifts_could_make_overflow_int32_stay_float() -> None:
    graph = fx.Graph()
    sample, _ = graph.placeholder("sample"), graph.placeholder("timestep")
    wide = graph.call_function(aten.repeat.default, (sample, [1, 1200, 1, 1]))
    layer = graph.call_function(aten.conv2d.default, (wide, graph.get_attr("layer.weight")))
    layer.meta["address"] = CONV.at
    graph.output(layer)
    made = program_of(graph, {"layer.weight": torch.ones(1, 4800, 1, 1)})
    program = registry.pipeline([("canonicalize", {}), ("flag-skips", {})]).run(made, PassContext())
    eight = Policy.load(policy(groups=1), ["default.weight.bits=8"])
    data = calibration(of_size([1.0, 0.1, 0.1, 0.1]), [0.0])
    for largest, refused in ((1, False), (7, True)):
        planned, ctx = fitted(data, eight, program)
        shifted = run_step(create("vote-shifts", {"where": "all", "largest": largest}), planned, ctx)
        lowered = run_step(create("lower-reference"), finished(shifted, ctx), ctx)
        assert bool(list(lowered.calls("qconv2d"))) != refused
        assert (
            "shifted by the steps of the input's channels" in refusals(lowered).get(str(CONV.at), "")
        ) == refused


# --- stored and shown


def compiled() -> CompiledUNet:
    program, ctx = fitted(BOTH, policy())
    result = finished(run_step(create("vote-shifts", {"where": "all"}), program, ctx), ctx)
    report = Report.measure(program, result, BOTH, rows=2)
    config = {"in_channels": 4, "out_channels": 4, "sample_size": 6}
    return CompiledUNet(
        result, config=config, target="reference", policy=ctx.policy, report=report, provenance={}
    )


def test_a_model_with_shifts_comes_back_bit_for_bit(tmp_path: object) -> None:
    q = compiled()
    q.save_pretrained(f"{tmp_path}/out")
    (inputs,) = BOTH.batches(6, q.program.inputs)
    for target in ("reference", "simulate"):
        r = store.load(f"{tmp_path}/out", target)
        assert torch.equal(
            r(inputs["sample"], inputs["timestep"]).sample,
            CompiledUNet(q.program, config=q.config, target=target)(
                inputs["sample"], inputs["timestep"]
            ).sample,
        )
    shift = r.program.table.get(CONV, Shift)
    assert shift is not None
    assert shift.exponent.tolist() == [[0, 1, 2, 3], [3, 2, 1, 0]]
    assert shift.exponent is r.program.weights()["layer.input_shift"]  # stored once
    assert r.report is not None
    assert q.report is not None
    assert r.report.layers == q.report.layers


def test_arms_and_shifts_of_a_table_come_back() -> None:
    program, tensors = program_before("lower-simulate", "shifts"), dict[str, Tensor]()
    found = read_table(replace(program, table=Table()), write_table(program, tensors), tensors).table
    assert found.of(SkipArm) == program.table.of(SkipArm)
    shifts = program.table.of(Shift)
    assert list(found.of(Shift)) == list(shifts)
    for site, shift in found.of(Shift).items():
        assert torch.equal(shift.exponent, shifts[site].exponent)
        assert shift.largest == shifts[site].largest


def test_a_report_that_was_written_without_notes_is_read() -> None:
    q = compiled()
    assert q.report is not None
    found = json.loads(q.report.to_json())
    for layer in found["layers"]:
        for site in layer["sites"]:
            del site["notes"]
    read = Report.from_json(json.dumps(found))
    assert read.layer("layer/conv2d").site("input") == replace(
        q.report.layer("layer/conv2d").site("input"), notes=()
    )


def test_shifts_and_arms_are_told_wherever_people_read() -> None:
    q = compiled()
    told = "4 of 4 channels have finer steps, down to 1/8"
    assert told in show(q.program, "layer/conv2d")
    assert told in why(q.program, "layer/conv2d")
    assert q.report is not None
    assert f"  - input: {told}" in q.report.table()
    assert q.report.layer("layer/conv2d").site("input").notes == (told,)
    assert Report.from_json(q.report.to_json()) == q.report
    split = program_before("plan-sites", "shifts")
    assert "skip arm of /cat" in show(split, "up.0.conv_shortcut/*")
    assert "deep arm of /cat" in why(split, "up.0.conv_shortcut/conv2d")
