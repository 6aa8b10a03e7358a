"""What each built-in pass does, refuses and complains of; goldens show the whole."""

from __future__ import annotations

import logging
import math
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from handmade import program_of
from hypothesis import given
from hypothesis import strategies as st
from planting import ORDER, POLICIES, bare, context, edited, program_before
from torch import fx
from toys import rows, toy

from dmqfx.checking.faked import real, unpacked
from dmqfx.checking.probes import at_edges, outputs
from dmqfx.checking.verify import checking, verify
from dmqfx.errors import CalibrationError, PassNotFoundError, PipelineError, PolicyError, RewriteError
from dmqfx.graph import ops
from dmqfx.graph.address import Address, Site
from dmqfx.graph.facts import CANONICAL, QDQ
from dmqfx.graph.invariants import check_structure
from dmqfx.graph.modules import clone
from dmqfx.graph.pipeline import Pass, PassContext, Pipeline, run_step
from dmqfx.graph.program import Program
from dmqfx.graph.registry import create, passes
from dmqfx.graph.rewrite import Rewriter
from dmqfx.graph.table import ChannelScale, Codes, LayerPair, Planned, Range, Shift, SkipConcat
from dmqfx.numbers.quant import QParams, QuantSpec
from dmqfx.passes.apply_scaling import column_factor
from dmqfx.passes.learn_scaling import LIMIT, closed_form
from dmqfx.passes.round_weights import nearest
from dmqfx.policy.policy import Policy

aten = torch.ops.aten


def after(name: str, policy: str = "layers", **options: object) -> Program:
    """The toy behind a pass."""
    return run_step(create(name, options), program_before(name, policy), context(policy))


def site(text: str) -> Site:
    return Site.parse(text)


def refusals(program: Program) -> Mapping[str, str]:
    return {str(refusal.at): refusal.reason for refusal in program.log[-1].refused}


def operators(program: Program) -> list[str]:
    return [ops.name(node) for node in program.calls()]


# --- canonicalize


def test_canonicalize_drops_what_does_nothing_and_nothing_else() -> None:
    before, result = operators(toy()), operators(after("canonicalize"))
    assert "dropout" not in result
    assert "_assert_tensor_metadata" not in result
    assert result.count("div") == 1  # by 2; the divisions by 1 are gone
    for kept in ("conv2d", "linear", "group_norm", "silu", "cat", "transpose", "reshape"):
        assert result.count(kept) == before.count(kept)


def test_canonicalize_keeps_casts_that_change_the_dtype() -> None:
    casts = list(after("canonicalize").calls("to"))
    dtypes = [(node.all_input_nodes[0].meta["val"].dtype, node.meta["val"].dtype) for node in casts]
    assert dtypes == [(torch.float32, torch.float64), (torch.float64, torch.float32)]


def test_canonicalize_computes_what_depends_on_no_input() -> None:
    result = after("canonicalize")
    assert not {"arange", "exp"} & set(operators(result))
    frequencies = result.weights()["time_embedding.unsqueeze"]
    torch.testing.assert_close(frequencies[0], 1000 ** (-torch.arange(4) / 4))


def test_canonicalize_keeps_a_view_that_straightens_the_strides_of_a_dim_of_one() -> None:
    graph = fx.Graph()
    x = graph.placeholder("sample")
    graph.placeholder("timestep")
    one = graph.call_function(aten.sum.dim_IntList, (x, [1]))
    last = graph.call_function(aten.unsqueeze.default, (one, -1))
    first = graph.call_function(aten.permute.default, (last, [0, 3, 1, 2]))
    sizes = [graph.call_function(aten.sym_size.int, (first, k)) for k in range(4)]
    graph.output(graph.call_function(aten.reshape.default, (first, sizes)))
    kept = run_step(create("canonicalize"), program_of(graph, {}), PassContext())
    assert operators(kept)[-1] == "reshape"


def test_canonicalize_keeps_a_reshape_that_may_change_a_stride() -> None:
    graph = fx.Graph()
    sample, _ = graph.placeholder("sample"), graph.placeholder("timestep")
    last = graph.call_function(aten.reshape.default, (sample, [-1, 6, 8, 1]))
    first = graph.call_function(aten.permute.default, (last, [0, 3, 1, 2]))
    same = graph.call_function(aten.reshape.default, (first, [-1, 1, 6, 8]))
    graph.output(graph.call_function(aten.conv2d.default, (same, graph.get_attr("kernel"))))
    program = program_of(graph, {"kernel": torch.ones(1, 1, 3, 3)})
    assert operators(create("canonicalize").run(program, PassContext())) == operators(program)


def test_canonicalize_spells_arguments_in_schema_order() -> None:
    for node in after("canonicalize").calls("conv2d", "linear", "group_norm", "cat"):
        assert not node.kwargs
        assert node.args == ops.call_spelling(node.target, ops.args(node))[0]


# --- flag-skips


def test_the_arms_of_a_skip_are_told_apart_by_what_they_are_made_of() -> None:
    found = after("flag-skips").table.of(SkipConcat)
    assert {str(at): (entry.deep, entry.skip, entry.skip_last) for at, entry in found.items()} == {
        "/cat:tensors": (12, 8, True),
        "/cat#1:tensors": (12, 8, True),
    }


def test_the_order_of_the_arms_does_not_matter() -> None:
    def swap(rw: Rewriter, node: fx.Node) -> fx.Node | None:
        first, second = ops.args(node)["tensors"]
        return rw.like(node, tensors=[second, first]) if ops.args(node)["dim"] == 1 else None

    swapped = run_step(edited("cat", swap)("canonicalize"), toy(), context())
    found = run_step(create("flag-skips"), swapped, context()).table.of(SkipConcat)
    assert {(entry.deep, entry.skip, entry.skip_last) for entry in found.values()} == {(12, 8, False)}


def test_a_concatenation_of_other_things_is_refused_with_a_reason() -> None:
    assert refusals(after("flag-skips")) == {
        "time_embedding/cat": "does not concatenate channels of feature maps [B, C, H, W]"
    }


def test_unevenness_is_measured_on_calibration_rows_only() -> None:
    program = program_before("flag-skips")
    blind = run_step(create("flag-skips"), program, replace(context(), calibration=None))
    assert all(entry.deep_variance != entry.deep_variance for entry in blind.table.of(SkipConcat).values())
    seen = after("flag-skips").table.of(SkipConcat).values()
    assert all(0 < entry.deep_variance < 1 and 0 < entry.skip_variance < 1 for entry in seen)
    everything = after("flag-skips", threshold=0.0).table.of(SkipConcat).values()
    assert all(entry.uneven for entry in everything)
    assert not any(
        entry.uneven for entry in after("flag-skips", threshold=10.0).table.of(SkipConcat).values()
    )


def peaked(deep: list[float], skip: list[float]) -> Program:
    """conv_in -> conv -> cat with conv_in's output, whose channels reach the given magnitudes."""
    graph = fx.Graph()
    sample, _ = graph.placeholder("sample"), graph.placeholder("timestep")
    held = {name: graph.get_attr(name) for name in ("skip.weight", "skip.bias", "deep.weight", "deep.bias")}
    first = graph.call_function(aten.conv2d.default, (sample, held["skip.weight"], held["skip.bias"]))
    second = graph.call_function(aten.conv2d.default, (first, held["deep.weight"], held["deep.bias"]))
    both = graph.call_function(aten.cat.default, ([second, first], 1))
    graph.output(graph.call_function(aten.mean.dim, (both, [1], True)))
    constants = {"skip.weight": torch.zeros(len(skip), 4, 1, 1), "skip.bias": torch.tensor(skip)}
    deep_weight = torch.zeros(len(deep), len(skip), 1, 1)
    return program_of(graph, {**constants, "deep.weight": deep_weight, "deep.bias": torch.tensor(deep)})


def test_the_variance_of_an_arm_is_over_its_channels_in_units_of_their_mean() -> None:
    program = peaked(deep=[1.0, -3.0], skip=[2.0, -2.0, 2.0])
    ctx = PassContext(calibration=rows(spec=program.inputs))
    (entry,) = create("flag-skips").run(program, ctx).table.of(SkipConcat).values()
    assert (entry.deep, entry.skip, entry.skip_last) == (2, 3, True)
    assert entry.deep_variance == pytest.approx(1 / 4)  # magnitudes 1 and 3: variance 1, mean 2
    assert entry.skip_variance == pytest.approx(0)
    assert entry.uneven
    verify(program, create("flag-skips"), ctx)


def test_nan_that_a_skip_carries_is_told_by_the_name_of_what_made_it() -> None:
    program = peaked(deep=[1.0, math.nan], skip=[2.0, 2.0])
    told = r"deep\.bias, read by block/conv2d#1, holds nan at \[1\]"
    with pytest.raises(CalibrationError, match=told):
        create("flag-skips").run(program, PassContext(calibration=rows(spec=program.inputs)))


# --- plan-sites


def test_the_plan_holds_every_site_and_who_decided() -> None:
    plan = after("plan-sites", "attention").table.of(Planned)
    assert plan[site("conv_in/conv2d:weight")] == Planned(None, "ends")
    assert plan[site("mid.to_k/linear:input")].spec == QuantSpec(6, boundaries=(250.0, 500.0, 750.0))
    assert plan[site("mid/scaled_dot_product_attention:value")].rule == "attention"
    assert plan[site("up.1.conv1/conv2d:weight")].spec == QuantSpec(8, "affine", "channel")
    assert len(plan) == 2 * 23 + 3


def test_a_plan_needs_a_policy() -> None:
    with pytest.raises(PipelineError, match="plan-sites needs a policy"):
        run_step(create("plan-sites"), program_before("plan-sites"), PassContext())


def test_a_rule_that_decides_nothing_is_a_mistake_of_the_policy() -> None:
    policy = Policy.load(POLICIES["layers"])
    idle = replace(policy, rules=(*policy.rules, replace(policy.rules[0], name="idle", at=("conv_inn/*",))))
    with pytest.raises(PolicyError, match=r"rule 'idle' matches no operation.*conv_in/conv2d"):
        run_step(create("plan-sites"), program_before("plan-sites"), PassContext(idle))


def test_a_weight_that_depends_on_an_input_stays_float() -> None:
    def computed(rw: Rewriter, node: fx.Node) -> fx.Node | None:
        if node.meta["address"].path != "mid.to_out":
            return None
        weight, bias = ops.args(node)["weight"], ops.args(node)["input"]
        total = rw.call(aten.sum.default, near=node, self=bias)
        return rw.like(node, weight=rw.call(aten.add.Tensor, near=node, self=weight, other=total))

    program = run_step(edited("linear", computed)("canonicalize"), toy(), context())
    result = run_step(create("plan-sites"), program, context())
    assert result.table.get(site("mid.to_out/linear:weight"), Planned) == Planned(None, "default")
    (at, reason), *others = refusals(result).items()
    assert at == "mid.to_out/linear"
    assert reason.startswith("the weight depends on an input, so it has no fixed codes")
    assert not others


def test_a_filter_that_takes_batch_and_channels_as_one_stays_float() -> None:
    graph = fx.Graph()
    sample, _ = graph.placeholder("sample"), graph.placeholder("timestep")
    rows = graph.call_function(aten.reshape.default, (sample, [-1, 1, 6, 8]))
    filtered = graph.call_function(aten.conv2d.default, (rows, graph.get_attr("kernel")))
    graph.output(filtered)
    program = program_of(graph, {"kernel": torch.ones(1, 1, 3, 3)})
    ctx = PassContext(replace(POLICIES["layers"], rules=()))
    result = run_step(create("plan-sites"), run_step(create("canonicalize"), program, ctx), ctx)
    assert [entry.spec for entry in result.table.of(Planned).values()] == [None, None]
    assert "does not work on a batch" in next(iter(refusals(result).values()))


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("flag-skips", {"rows": 0}, "rows must be at least 1, not 0"),
        ("freeze-observers", {"batch": -1}, "batch must be at least 1, not -1"),
        ("learn-scaling", {"exponent": 2}, "exponent must be between 0 and 1, not 2"),
        ("learn-scaling", {"method": "smooth"}, "option method must be one of .*smoothquant"),
        ("round-weights", {"method": 4}, "option method must be one of .*nearest"),
        ("round-weights", {"rows": 0}, "rows must be at least 1, not 0"),
        ("round-weights", {"iterations": 0}, "iterations must be at least 1, not 0"),
        ("round-weights", {"asymmetric": 1.5}, "asymmetric must be between 0 and 1, not 1.5"),
        ("round-weights", {"warmup": -0.1}, "warmup must be between 0 and 1, not -0.1"),
        ("round-weights", {"damping": -1}, "damping must be at least 0, not -1"),
        ("round-weights", {"settling": math.nan}, "settling must be at least 0, not nan"),
        ("round-weights", {"beta_start": 1}, "beta_start must be above 1, not 1"),
        ("round-weights", {"beta_end": 0.5}, "beta_end must be above 1, not 0.5"),
        ("round-weights", {"rate": 0}, "rate must be above 0, not 0"),
        ("round-weights", {"start": "best"}, "option start must be one of nearest, gptq, not 'best'"),
        ("freeze-observers", {"batch": 2.5}, "option batch must be a whole number, not 2.5"),
        ("flag-skips", {"threshold": "high"}, "option threshold must be a number, not 'high'"),
        ("canonicalize", {"rows": 1}, "canonicalize has no option 'rows'"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused_before_anything_runs(
    name: str, options: Mapping[str, object], told: str
) -> None:
    with pytest.raises(PassNotFoundError, match=told):
        create(name, options)


# --- observers


def test_sites_that_read_one_tensor_share_an_observer() -> None:
    result = after("insert-observers")
    readers = [result.source(site(f"mid.to_{letter}/linear:input")) for letter in "qkv"]
    assert len(set(readers)) == 1
    assert readers[0].op == "call_module"
    assert len(list(result.graph.find_nodes(op="call_module", target=readers[0].target))) == 1


def test_observers_are_gone_when_their_ranges_are_known() -> None:
    result = after("freeze-observers")
    assert result.gm.code == program_before("insert-observers").gm.code
    seen = result.table.get(site("down.conv1/conv2d:input"), Range)
    assert seen is not None
    assert seen.low.shape == seen.high.shape == (4, 8)
    assert seen.boundaries == (250.0, 500.0, 750.0)
    assert seen.count.tolist() == [3 * 64] * 4


def test_freezing_needs_calibration_that_fits() -> None:
    program = program_before("freeze-observers")
    with pytest.raises(CalibrationError, match="pass calibration= or let compile make one"):
        run_step(create("freeze-observers"), program, PassContext(POLICIES["layers"]))
    bad = rows()
    column = bad.groups[0].columns["sample"]
    wide = replace(
        bad.groups[0],
        columns={**bad.groups[0].columns, "sample": replace(column, values=column.values[:, :2])},
    )
    with pytest.raises(CalibrationError, match="sample"):
        run_step(
            create("freeze-observers"), program, PassContext(POLICIES["layers"], replace(bad, groups=(wide,)))
        )


def test_groups_without_rows_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    few = rows()
    only = replace(few, groups=(few.groups[0].take(torch.tensor([0, 1, 11])),))
    with caplog.at_level(logging.WARNING):
        result = run_step(
            create("freeze-observers"),
            program_before("freeze-observers"),
            replace(context(), calibration=only),
        )
    told = [record.getMessage() for record in caplog.records if "timestep groups" in record.getMessage()]
    assert told == [
        "2 of 4 timestep groups have no calibration row (1, 2); they take the nearest group's ranges"
    ]
    seen = result.table.get(site("downsample/conv2d:input"), Range)
    assert seen is not None
    assert torch.equal(seen.low[1], seen.low[0])
    assert torch.equal(seen.low[2], seen.low[3])


# --- equivalent scaling


def test_layers_that_read_one_tensor_share_one_scale() -> None:
    pair = after("pair-layers").table.get(site("mid.to_q/linear:input"), LayerPair)
    assert pair is not None
    assert [str(reader.at) for reader in pair.readers] == [f"mid.to_{letter}/linear" for letter in "qkv"]
    assert pair.producer == Address.parse("mid.norm1/layer_norm")


def test_a_pair_says_why_nobody_can_absorb_its_scale() -> None:
    pairs = after("pair-layers").table.of(LayerPair)
    assert (
        pairs[site("down.conv1/conv2d:input")].reason == "down/silu mixes channels or is not linear in them"
    )
    assert "down/add#1" in pairs[site("downsample/conv2d:input")].reason
    assert all((pair.producer is None) == bool(pair.reason) for pair in pairs.values())


def test_attention_and_the_gate_are_looked_through() -> None:
    pairs = after("pair-layers").table.of(LayerPair)
    assert str(pairs[site("mid.to_out/linear:input")].producer) == "mid.to_v/linear"
    assert str(pairs[site("mid.out/linear:input")].producer) == "mid.proj/linear"


def test_the_closed_form_splits_the_difficulty_by_the_exponent() -> None:
    x, w = torch.tensor([8.0, 2.0, 1.0]), torch.tensor([1.0, 2.0, 4.0])
    for exponent, expected in ((1.0, x), (0.0, 1 / w), (0.5, (x / w).sqrt())):
        gamma = closed_form(x, w, exponent)
        torch.testing.assert_close(gamma / gamma[0], expected / expected[0])
        assert float(gamma.log().mean()) == pytest.approx(0, abs=1e-6)


@given(
    st.lists(st.floats(0, 1e30), min_size=1, max_size=6).flatmap(
        lambda x: st.tuples(st.just(x), st.lists(st.floats(0, 1e30), min_size=len(x), max_size=len(x)))
    ),
    st.floats(0, 1),
)
def test_a_scale_is_always_positive_and_finite(
    peaks: tuple[list[float], list[float]], exponent: float
) -> None:
    x, w = (torch.tensor(peak, dtype=torch.float64) for peak in peaks)
    gamma = closed_form(x, w, exponent)
    assert bool((gamma >= 1 / LIMIT).all())
    assert bool((gamma <= LIMIT).all())
    assert bool((gamma[(x == 0) | (w == 0)] == 1).all())


def test_a_scale_reaches_the_columns_of_its_own_group() -> None:
    gamma = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert column_factor((6, 4), gamma).tolist() == [[1.0, 2.0, 3.0, 4.0]]
    assert column_factor((4, 2, 3, 3), gamma)[:, :, 0, 0].tolist() == [
        [1.0, 2.0],
        [1.0, 2.0],
        [3.0, 4.0],
        [3.0, 4.0],
    ]


def test_readers_share_one_division_and_ranges_follow() -> None:
    before, result = program_before("apply-scaling"), after("apply-scaling")
    readers = {result.source(site(f"mid.to_{letter}/linear:input")) for letter in "qkv"}
    assert [str(node.meta["address"]) for node in readers] == ["mid.to_q/div~apply-scaling.1"]
    at = site("mid.to_k/linear:input")
    scale = before.table.get(site("mid.to_q/linear:input"), ChannelScale)
    old, new = before.table.get(at, Range), result.table.get(at, Range)
    assert scale is not None
    assert old is not None
    assert new is not None
    torch.testing.assert_close(new.high * scale.gamma, old.high)


def test_a_scale_is_applied_once() -> None:
    with pytest.raises(
        PipelineError,
        match=r"step 2, apply-scaling, requires 'learned' .*; "
        "put learn-scaling behind apply-scaling, which ends it, and before it",
    ):
        Pipeline((create("apply-scaling"), create("apply-scaling"))).run(
            program_before("apply-scaling"), context(), providers=tuple(passes().values())
        )


def test_absorbed_scales_leave_no_division() -> None:
    left = {str(node.meta["address"]) for node in after("absorb-scaling").calls("div")}
    for absorbed in ("mid.to_q", "mid.to_out", "mid.proj", "mid.out"):
        assert f"{absorbed}/div~apply-scaling.1" not in left
    assert "down.conv1/div~apply-scaling.1" in left
    assert set(refusals(after("absorb-scaling"))) == left - {"up.1/div"}


def scaled(make: Callable[[fx.Graph, fx.Node], fx.Node], gamma: torch.Tensor) -> Program:
    """conv -> something -> / gamma -> conv, as apply-scaling leaves it."""
    graph = fx.Graph()
    sample, _ = graph.placeholder("sample"), graph.placeholder("timestep")
    first = graph.call_function(aten.conv2d.default, (sample, graph.get_attr("w")))
    divided = graph.call_function(aten.div.Tensor, (make(graph, first), graph.get_attr("gamma")))
    graph.output(graph.call_function(aten.conv2d.default, (divided, graph.get_attr("w"))))
    return program_of(graph, {"w": torch.randn(4, 4, 1, 1), "gamma": gamma})


def test_a_value_that_is_read_twice_by_one_operation_takes_no_scale() -> None:
    squared = scaled(lambda graph, x: graph.call_function(aten.mul.Tensor, (x, x)), torch.rand(4, 1, 1) + 0.5)
    result = run_step(create("absorb-scaling"), squared, PassContext())
    assert refusals(result) == {"block/div#2": "block/mul#1 reads block/conv2d more than once"}
    verify(squared, create("absorb-scaling"))


@pytest.mark.parametrize("shape", [(4, 1, 1), (1, 4, 1, 1)])
def test_a_divisor_per_channel_is_absorbed_however_it_is_laid_out(shape: tuple[int, ...]) -> None:
    program = scaled(lambda graph, x: x, torch.rand(shape) + 0.5)
    verify(program, create("absorb-scaling"))
    assert not list(run_step(create("absorb-scaling"), program, PassContext()).calls("div"))


@pytest.mark.parametrize("shape", [(4, 6, 1), (1, 6, 1), (8,), (4, 6, 8)])
def test_a_divisor_that_is_not_per_channel_is_left_alone(shape: tuple[int, ...]) -> None:
    program = scaled(lambda graph, x: x, torch.rand(shape) + 0.5)
    assert list(run_step(create("absorb-scaling"), program, PassContext()).calls("div"))


def test_only_a_divisor_per_channel_joins_the_quantize_step() -> None:
    names = "canonicalize plan-sites insert-observers freeze-observers round-weights insert-qdq".split()
    for shape, joins in (((4, 1, 1), True), ((4, 6, 1), False)):
        program = scaled(lambda graph, x: x, torch.rand(shape) + 0.5)
        ctx = PassContext(replace(POLICIES["layers"], rules=()), rows(spec=program.inputs))
        result = Pipeline(tuple(map(bare, names))).run(program, ctx)
        assert any(result.calls("div")) != joins


def test_a_quantized_value_keeps_its_range() -> None:
    reasons = refusals(after("absorb-scaling", "attention"))
    assert reasons["mid.to_out/div~apply-scaling.1"] == (
        "mid/scaled_dot_product_attention:value is quantized, in the range of the unscaled tensor"
    )


# --- codes


@given(st.sampled_from(("symmetric", "affine")), st.sampled_from(("tensor", "channel")), st.integers(2, 8))
def test_a_weight_is_rounded_by_half_a_step_at_most(grid: str, per: str, bits: int) -> None:
    weight = torch.randn(5, 3, 2, 2)
    entry = nearest(weight, QuantSpec(bits, grid, per))
    back = real(unpacked(entry, bits), replace(entry.qparams, axis=0), None)
    step = entry.qparams.scale.reshape(-1, 1, 1, 1)
    assert bool(((back - weight).abs() <= step * (0.5 + 1e-5)).all())


def test_every_planned_weight_and_no_other_has_codes() -> None:
    result = after("round-weights")
    planned = {
        at for at, plan in result.table.of(Planned).items() if at.arg == "weight" and plan.spec is not None
    }
    assert set(result.table.of(Codes)) == planned
    assert result.gm.code == program_before("round-weights").gm.code


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_is_named(bad: float) -> None:
    program = program_before("round-weights")
    weights = program.weights()
    weights["mid.to_v.weight"] = weights["mid.to_v.weight"].index_fill(0, torch.tensor([3]), bad)
    spoiled = replace(program, gm=clone(program.gm, weights))
    told = rf"mid\.to_v\.weight, read by mid\.to_v/linear, holds {bad} at \[3, 0\]"
    with pytest.raises(CalibrationError, match=told):
        run_step(create("round-weights", {"method": "nearest"}), spoiled, context())


@pytest.mark.parametrize(
    ("kind", "helper"), [(Codes, "round-weights"), (Range, "fit-ranges or freeze-observers")]
)
def test_insert_qdq_says_which_pass_was_forgotten(kind: type, helper: str) -> None:
    program = program_before("insert-qdq")
    table = program.table
    for at in table.of(kind):
        table = table.drop(at, kind)
    bare = program.with_table(table)
    with pytest.raises(RewriteError, match=f"has no {kind.__name__.lower()}; run {helper} before"):
        create("insert-qdq").run(bare, context())


def test_scales_that_nobody_absorbed_join_the_quantize_step() -> None:
    result = after("insert-qdq")
    assert {str(node.meta["address"]) for node in result.calls("div")} == {"up.1/div"}
    quantize = result.node("down.conv1/quantize~insert-qdq.1")
    assert str(ops.tensor(quantize, "x").meta["address"]) == "down/silu"
    assert ops.tensor(quantize, "scale").meta["val"].shape == (4, 8)
    dequantize = result.node("down.conv1/dequantize~insert-qdq.1")
    assert ops.tensor(dequantize, "scale").meta["val"].shape == (4, 1)


def test_sites_share_a_quantize_where_their_parameters_are_equal() -> None:
    result = after("insert-qdq", "attention")
    query, key, value = (result.source(site(f"mid.to_{letter}/linear:input")) for letter in "qkv")
    assert query is value
    assert query is not key
    assert result.table.get(site("mid.to_k/linear:input"), QParams).qmax == 63


def test_the_group_of_a_sample_is_computed_once() -> None:
    assert operators(after("insert-qdq")).count("timestep_group") == 1


def test_each_sample_is_quantized_by_its_own_timestep() -> None:
    result = after("insert-qdq").astype(torch.float64)
    (inputs,) = at_edges(result, torch.Generator().manual_seed(0))
    together = outputs(result, inputs)[0]
    for k in range(len(together)):
        alone = outputs(result, {name: value[k : k + 1] for name, value in inputs.items()})[0]
        torch.testing.assert_close(together[k : k + 1], alone, rtol=1e-9, atol=1e-9)


# --- lowering


def test_lower_simulate_leaves_no_packed_weight() -> None:
    result = after("lower-simulate")
    assert "unpack" not in operators(result)
    assert not any(name.endswith("_packed") for name in result.weights())
    assert QDQ not in result.facts


def test_lower_reference_makes_every_quantized_layer_an_integer_one() -> None:
    result = after("lower-reference")
    assert operators(result).count("qlinear") + operators(result).count("qconv2d") == 21
    floats = [str(node.meta["address"]) for node in result.calls("conv2d", "linear")]
    assert floats == ["conv_in/conv2d", "conv_out/conv2d"]


def test_lower_reference_says_which_layers_stay_float_and_why() -> None:
    reasons = refusals(after("lower-reference", "attention"))
    assert "a scale per channel" in reasons["up.0.conv_shortcut/conv2d"]
    weights_only = replace(POLICIES["layers"], default=replace(POLICIES["layers"].default, input="float"))
    ctx = PassContext(replace(weights_only, rules=()))
    program = toy()
    for name in ("canonicalize", "plan-sites", "round-weights", "insert-qdq", "lower-reference"):
        program = run_step(bare(name), program, ctx)
    assert set(refusals(program).values()) == {
        "the input is float: weight-only layers are dequantized at every call"
    }


def test_lower_cpu_makes_native_what_the_kernels_take_and_keeps_no_other_weight_of_it() -> None:
    result = after("lower-cpu")
    found = operators(result)
    assert found.count("kernel_linear") + found.count("kernel_conv2d") == 17
    assert found.count("qlinear") + found.count("qconv2d") == 4
    reasons = refusals(result)
    assert set(reasons) == {str(node.meta["address"]) for node in result.calls("qconv2d", "qlinear")}
    assert all("make the weight's grid symmetric" in reason for reason in reasons.values())
    native = list(result.calls("kernel_conv2d", "kernel_linear"))
    for node in native:
        stem = f"{node.meta['address'].path}.weight"
        held = {name for name in result.weights() if name.startswith(stem)}
        assert held == {f"{stem}_kernel", f"{stem}_scale"}


def test_lower_cpu_makes_shifted_channels_native_and_dequantizes_float_weights_once() -> None:
    shifted = after("lower-cpu", "shifts")
    arms = {site.at for site in shifted.table.of(Shift)}
    assert arms
    assert not [reason for reason in refusals(shifted).values() if "shift" in reason]
    native = {
        node.meta["address"] for node in shifted.calls("kernel_conv2d") if ops.args(node)["shift"] is not None
    }
    grids = {at for at in arms if str(at) in refusals(shifted)}  # weights that no kernel takes
    assert native == arms - grids
    assert native
    per_channel = after("lower-cpu", "attention")
    assert "up.0.conv_shortcut.weight_simulated" in per_channel.weights()
    assert not list(per_channel.calls("unpack"))


def test_lower_cpu_without_the_library_changes_no_layer_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    step = create("lower-cpu")
    monkeypatch.setattr(sys.modules[type(step).__module__], "absent", lambda: "there is no library")
    result = run_step(step, program_before("lower-cpu"), context())
    assert not list(result.calls("kernel_conv2d", "kernel_linear"))
    assert set(refusals(result).values()) == {"there is no library"}


@pytest.mark.parametrize(
    ("moved", "told"),
    [
        (-300.0, r"-\d+ to -\d+"),
        (0.5, r"\d+\.5 to \d+\.5"),
        (math.inf, "inf to inf"),
        (math.nan, "nan to nan"),
    ],
)
def test_lower_cpu_leaves_layers_whose_zero_points_are_no_codes(moved: float, told: str) -> None:
    before = program_before("lower-cpu")
    first = next(before.calls("qconv2d"))
    name = str(ops.tensor(first, "x_zero_point").target)
    weights = {**before.weights(), name: before.weights()[name] + moved}
    result = run_step(create("lower-cpu"), replace(before, gm=clone(before.gm, weights)), context())
    (reason,) = set(refusals(result).values()) - set(refusals(after("lower-cpu")).values())
    assert re.fullmatch(
        rf"zero points of the input go from {told}, kernels take whole ones from 0 to 255", reason
    )
    assert ops.is_call(result.node(first.meta["address"]), "qconv2d")


@pytest.mark.parametrize(
    ("operator", "edit", "activation"),
    [
        ("gelu", lambda rw, node: None, "geglu"),
        ("gelu", lambda rw, node: rw.like(node, approximate="tanh"), "none"),
        ("chunk", lambda rw, node: rw.like(node, dim=2), "geglu"),
        (
            "mul",
            lambda rw, node: ops.args(node)["other"] if str(node.meta["address"]) == "mid/mul#1" else None,
            "gelu",
        ),
    ],
)
def test_fuse_takes_gelu_with_and_without_a_gate_where_it_is_the_exact_one(
    operator: str, edit: Callable[[Rewriter, fx.Node], fx.Node | None], activation: str
) -> None:
    program = run_step(edited(operator, edit)("lower-cpu"), program_before("lower-cpu"), context())
    fused = run_step(create("fuse"), program, context())
    made = [
        node
        for node in fused.calls("kernel_quantize", "kernel_linear")
        if node.meta["address"].path == "mid.out"
    ]
    found = [node for node in made if node.meta["address"].op == "quantize"]
    assert [ops.args(node)["activation"] for node in found] == [activation]
    assert [ops.name(node) for node in found] == [
        "kernel_linear" if activation == "geglu" else "kernel_quantize"
    ]
    assert ("gelu" in operators(fused)) == (activation == "none")


def test_a_convolution_padded_by_a_word_stays_float() -> None:
    graph = fx.Graph()
    sample, _ = graph.placeholder("sample"), graph.placeholder("timestep")
    graph.output(
        graph.call_function(aten.conv2d.padding, (sample, graph.get_attr("w"), None, [1, 1], "same"))
    )
    program = program_of(graph, {"w": torch.randn(4, 4, 3, 3)})
    ctx = PassContext(replace(POLICIES["layers"], rules=()), rows(spec=program.inputs))
    names = (
        "canonicalize plan-sites insert-observers freeze-observers round-weights insert-qdq lower-reference"
    )
    result = Pipeline(tuple(map(bare, names.split()))).run(program, ctx, observe=checking())
    assert refusals(result) == {"block/conv2d": "its padding is the word 'same', not a number for each side"}


# --- pipelines and structure


def test_a_wrong_order_is_refused_with_a_hint() -> None:
    steps = tuple(create(name) for name in ("canonicalize", "round-weights", "plan-sites"))
    with pytest.raises(
        PipelineError, match=r"step 2, round-weights, requires 'planned' .*move plan-sites before it"
    ):
        Pipeline(steps).run(toy(), context())
    with pytest.raises(PipelineError, match="put canonicalize before it"):
        Pipeline((create("plan-sites"),)).run(toy(), context(), providers=tuple(passes().values()))
    with pytest.raises(PipelineError, match="no known pass provides it"):
        Pipeline((create("plan-sites"),)).run(toy(), context())


def test_an_author_must_say_what_a_pass_preserves() -> None:
    class SayNothing(Pass):
        def run(self, program: Program, ctx: PassContext) -> Program:
            return program

    with pytest.raises(PipelineError, match="step 1, say-nothing, does not declare what it preserves"):
        Pipeline((SayNothing(),)).run(toy(), PassContext())
    with pytest.raises(PipelineError, match=r"^say-nothing does not declare what it preserves"):
        verify(toy(), SayNothing())


def test_facts_come_and_go_and_the_log_grows() -> None:
    result = program_before("insert-qdq")
    assert (
        sorted(map(str, result.facts)) == "calibrated canonical flagged paired planned rounded scaled".split()
    )
    assert [record.name for record in result.log] == ORDER[:-1]
    assert CANONICAL in result.facts


def broken(how: str) -> Program:
    program = program_before("insert-qdq").fork()
    silu = program.node("down/silu")
    match how:
        case "no address":
            del silu.meta["address"]
        case "no value":
            del silu.meta["val"]
        case "two of one address":
            silu.meta["address"] = Address.parse("mid/gelu")
        case "gone":
            conv = program.node("up.0.conv1/conv2d")
            conv.meta["address"] = Address("up.0.conv1", "other")
        case "other outputs":
            output = program.graph.output_node()
            output.args = (silu,)
        case "read before it is made":
            program.node("conv_in/conv2d").replace_input_with(
                next(iter(program.node("conv_in/conv2d").all_input_nodes)), silu
            )
    return program


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("no address", "step left silu_\\d+ without an address; make nodes through the Rewriter"),
        ("no value", "step left down/silu without a fake value"),
        ("two of one address", "step left two operations at mid/gelu"),
        ("gone", "step left a table entry for up.0.conv1/conv2d:input, but that operation is gone"),
        ("other outputs", "step changed the outputs from"),
        ("read before it is made", "step left a broken graph"),
    ],
)
def test_a_broken_program_is_refused_by_name_and_address(how: str, told: str) -> None:
    before = program_before("insert-qdq")
    check_structure(before, "step", before)
    with pytest.raises(RewriteError, match=told):
        check_structure(broken(how), "step", before)
