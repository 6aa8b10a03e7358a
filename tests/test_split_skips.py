"""split-skips: two layers for one, exactly; what cannot be split says why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from handmade import program_of
from hypothesis import given
from hypothesis import strategies as st
from models import captured
from planting import POLICIES, context, edited, program_before
from torch import Tensor, fx
from toys import toy

from dmqfx.checking.judges import distance
from dmqfx.checking.probes import draw, outputs
from dmqfx.checking.tablecheck import broken_claims
from dmqfx.checking.verify import verify
from dmqfx.graph import ops, registry
from dmqfx.graph.address import Address, Site
from dmqfx.graph.facts import PLANNED
from dmqfx.graph.pipeline import PassContext, run_step
from dmqfx.graph.program import Program
from dmqfx.graph.registry import create
from dmqfx.graph.rewrite import Rewriter
from dmqfx.graph.sites import operations
from dmqfx.graph.table import Codes, Planned, Range, SkipArm, SkipConcat
from dmqfx.numbers.adaround import Annealing
from dmqfx.numbers.quant import QuantSpec
from dmqfx.numbers.rounding import Reconstruction
from dmqfx.passes import round_weights
from dmqfx.policy.policy import Policy
from dmqfx.seeing.picture import picture
from dmqfx.seeing.ushape import u_shape

aten = torch.ops.aten


def split(program: Program) -> Program:
    """The program with its skips flagged and split."""
    steps = [(name, {}) for name in ("canonicalize", "flag-skips", "split-skips")]
    return registry.pipeline(steps).run(program, PassContext())


def refusals(program: Program) -> Mapping[str, str]:
    return {str(refusal.at): refusal.reason for refusal in program.log[-1].refused}


def arms(program: Program) -> dict[str, tuple[str, str]]:
    found = program.table.of(SkipArm)
    return {str(site): (entry.arm, str(entry.concat)) for site, entry in found.items()}


def skipping(deep: int = 4, *, first: bool = False, normed: bool = True, **how: object) -> Program:
    """conv(sample) is the skip of two more convolutions; then a convolution of both arms and, perhaps, a norm."""
    generator = torch.Generator().manual_seed(0)
    groups, taps = int(str(how.get("groups", 1))), how.pop("taps", (1, 1))
    shapes = {
        "skip.weight": (2, 4, 1, 1), "down.weight": (3, 2, 1, 1), "deep.weight": (deep, 3, 3, 3),
        "last.weight": (4, (deep + 2) // groups, *taps), "last.bias": (4,), "gain": (deep + 2,), "loss": (deep + 2,),
    }  # fmt: skip
    constants = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    graph = fx.Graph()
    call, (sample, _) = graph.call_function, (graph.placeholder("sample"), graph.placeholder("timestep"))
    held = {name: graph.get_attr(name) for name in constants}
    skip = call(aten.conv2d.default, (sample, held["skip.weight"]))
    down = call(aten.silu.default, (call(aten.conv2d.default, (skip, held["down.weight"])),))
    deep_arm = call(aten.conv2d.default, (down, held["deep.weight"], None, [1, 1], [1, 1]))
    both = call(aten.cat.default, ([skip, deep_arm] if first else [deep_arm, skip], 1))
    last = call(aten.conv2d.default, (both, held["last.weight"], held["last.bias"]), how)
    last.meta["address"] = Address("last", "conv2d")
    result = last
    if normed:
        norm = call(aten.group_norm.default, (both, 1, held["gain"], held["loss"]))
        result = call(aten.add.Tensor, (last, call(aten.mean.default, (norm,))))
    graph.output(result)
    return program_of(graph, constants)


def same_output(before: Program, after: Program) -> float:
    """The greatest relative distance over the probes, in float64."""
    one, two = before.astype(torch.float64), after.astype(torch.float64)
    probes = draw(one, torch.Generator().manual_seed(0))
    return max(distance(outputs(two, inputs)[0], outputs(one, inputs)[0]) for inputs in probes)


# --- what is split


@given(
    st.integers(1, 5),
    st.booleans(),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(1, 2), st.integers(1, 2)),
    st.tuples(st.integers(0, 2), st.integers(0, 2)),
    st.integers(1, 2),
)
def test_any_window_and_either_order_of_the_arms_is_split_exactly(
    deep: int,
    first: bool,
    taps: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: int,
) -> None:
    program = skipping(
        deep,
        first=first,
        normed=False,
        taps=taps,
        stride=[*stride],
        padding=[*padding],
        dilation=[dilation] * 2,
    )
    result = split(program)
    assert same_output(program, result) < 1e-12
    assert {entry.arm for entry in result.table.of(SkipArm).values()} == {"deep", "skip"}
    assert list(broken_claims(result)) == []


def test_a_convolution_that_is_padded_by_a_word_is_split_too() -> None:
    def worded(rw: Rewriter, node: fx.Node) -> fx.Node | None:
        named = {key: value for key, value in ops.args(node).items() if key != "padding"}
        if not ops.is_call(named["input"], "cat"):
            return None
        return rw.call_at(aten.conv2d.padding, node.meta["address"], **named, padding="same")

    program = edited("conv2d", worded)("canonicalize").run(
        skipping(taps=(3, 3), padding=[1, 1], normed=False), PassContext()
    )
    result = split(program)
    assert len(arms(result)) == 2
    assert same_output(program, result) < 1e-12


def test_each_arm_is_a_layer_that_reads_its_own_tensor_and_its_own_columns() -> None:
    before = run_step(create("flag-skips"), program_before("flag-skips"), context())
    result, whole = split(toy()), before.constant_at(Site.parse("up.0.conv_shortcut/conv2d:weight"))
    deep, skip = (Address.parse(f"up.0.conv_shortcut/conv2d{tail}") for tail in ("", "~split-skips.1"))
    assert str(result.source(Site(deep, "input")).meta["address"]) == "upsample/conv2d"
    assert str(result.source(Site(skip, "input")).meta["address"]) == "down/add#1"
    assert torch.equal(result.constant_at(Site(deep, "weight")), whole[:, :12])
    assert torch.equal(result.constant_at(Site(skip, "weight")), whole[:, 12:])
    assert ops.args(result.node(deep))["bias"] is not None
    assert ops.args(result.node(skip))["bias"] is None
    assert arms(result) == {
        "up.0.conv_shortcut/conv2d:input": ("deep", "/cat"),
        "up.0.conv_shortcut/conv2d~split-skips.1:input": ("skip", "/cat"),
        "up.1.conv_shortcut/conv2d:input": ("deep", "/cat#1"),
        "up.1.conv_shortcut/conv2d~split-skips.1:input": ("skip", "/cat#1"),
    }


def test_the_weight_of_the_given_program_is_not_touched() -> None:
    program = program_before("split-skips", "shifts")
    kept = program.weights()["up.0.conv_shortcut.weight"].clone()
    result = run_step(create("split-skips"), program, context("shifts"))
    assert torch.equal(program.weights()["up.0.conv_shortcut.weight"], kept)
    assert result.weights()["up.0.conv_shortcut.weight"].shape[1] == 12


def test_a_concatenation_that_is_read_no_more_is_gone_and_one_that_is_read_stays() -> None:
    kept, gone = split(skipping(normed=True)), split(skipping(normed=False))
    assert len(list(kept.calls("cat"))) == len(kept.table.of(SkipConcat)) == 1
    assert not list(gone.calls("cat"))
    assert not gone.table.of(SkipConcat)
    assert {concat for _, concat in arms(gone).values()} == {"block/cat#4"}


def test_splitting_twice_is_splitting_once() -> None:
    once = split(toy())
    twice = run_step(create("split-skips"), once, PassContext())
    assert twice.gm.code == once.gm.code
    assert twice.log[-1].applied == ()


@pytest.mark.parametrize("name", ["conditional"])
def test_every_decoder_shortcut_of_a_real_unet_is_split(name: str) -> None:
    _, program = captured(name)
    ctx = PassContext()
    flagged = registry.pipeline([("canonicalize", {}), ("flag-skips", {})]).run(program, ctx)
    assert verify(flagged, create("split-skips"), ctx).error < 1e-13
    result = run_step(create("split-skips"), flagged, ctx)
    shortcuts = {str(n.meta["address"]) for n in flagged.calls("conv2d") if "up" in n.meta["address"].path}
    shortcuts = {at for at in shortcuts if "conv_shortcut" in at}
    assert len(shortcuts) == len(flagged.table.of(SkipConcat)) > 0
    assert {
        site.removesuffix(":input") for site, (arm, _) in arms(result).items() if arm == "deep"
    } == shortcuts


# --- what is refused


def test_a_grouped_convolution_is_refused() -> None:
    result = split(skipping(deep=2, groups=2, normed=False))
    assert refusals(result) == {"last/conv2d": "it has 2 groups, which need not end where the arms do"}
    assert not arms(result)


def test_a_concatenation_that_only_a_norm_reads_is_refused() -> None:
    def detour(rw: Rewriter, node: fx.Node) -> fx.Node | None:
        source = ops.args(node)["input"]
        if not ops.is_call(source, "cat"):
            return None
        return rw.like(node, input=rw.call(aten.relu.default, near=node, self=source))

    result = split(edited("conv2d", detour)("canonicalize").run(skipping(normed=False), PassContext()))
    assert refusals(result) == {
        "block/cat#4": "no convolution reads it directly, only last/relu~edit.1",
    }


def test_a_weight_that_depends_on_an_input_is_refused() -> None:
    def computed(rw: Rewriter, node: fx.Node) -> fx.Node | None:
        named = ops.args(node)
        if not ops.is_call(named["input"], "cat"):
            return None
        total = rw.call(aten.mean.default, near=node, self=named["input"])
        return rw.like(node, weight=rw.call(aten.add.Tensor, near=node, self=named["weight"], other=total))

    result = split(edited("conv2d", computed)("canonicalize").run(skipping(), PassContext()))
    assert refusals(result)["last/conv2d"] == "its weight depends on an input"


def test_a_layer_that_is_planned_is_refused_and_told_where_to_put_the_pass() -> None:
    planned = run_step(create("plan-sites"), program_before("plan-sites"), context())
    result = run_step(create("split-skips"), planned, context())
    reason = "it is planned as a whole already; put split-skips before plan-sites"
    assert refusals(result) == {f"up.{k}.conv_shortcut/conv2d": reason for k in (0, 1)}
    assert result.gm.code == planned.gm.code


# --- both arms are treated alike (the published code forgets the second one)


def test_a_policy_finds_both_arms_by_what_feeds_them_and_by_the_layers_own_name() -> None:
    program = split(toy())
    fed = {str(op.address) for op in operations(program) if op.fed_by_skip}
    assert fed == {site.removesuffix(":input") for site in arms(program)}
    rules = [{"name": "one", "at": "up.0.conv_shortcut/conv2d", "input": {"bits": 5}},
             {"name": "skips", "fed_by": "skip_concat", "weight": {"bits": 3}},
             {"name": "arm", "at": "up.1.conv_shortcut/conv2d~split-skips.1", "input": {"bits": 7}}]  # fmt: skip
    policy = Policy.load({**_plain(POLICIES["shifts"]), "rules": rules})
    plan = run_step(create("plan-sites"), program, PassContext(policy)).table.of(Planned)
    bits = {str(site): p.spec.bits for site, p in plan.items() if p.spec and "conv_shortcut" in site.at.path}
    assert bits == {
        "up.0.conv_shortcut/conv2d:input": 5, "up.0.conv_shortcut/conv2d~split-skips.1:input": 5,
        "up.1.conv_shortcut/conv2d:input": 8, "up.1.conv_shortcut/conv2d~split-skips.1:input": 7,
        **{site.replace(":input", ":weight"): 3 for site in arms(program)},
    }  # fmt: skip


def _plain(policy: Policy) -> dict[str, object]:
    default = {
        "weight": {"bits": 4},
        "input": {"bits": 8, "groups": 4},
    }
    pipeline = [step.name for step in policy.pipeline]
    return {"schema": "dmqfx.policy/1", "name": "arms", "default": default, "pipeline": pipeline}


def test_both_arms_are_rounded_for_good_and_no_float_weight_of_either_is_left() -> None:
    """The published code leaves the second arm's weight softly rounded, and without its regulariser."""
    result = program_before("lower-simulate", "shifts")
    for site in result.table.of(SkipArm):
        codes = result.table.get(Site(site.at, "weight"), Codes)
        assert codes is not None
        assert codes.qparams.scale.shape == (1, codes.shape[0])  # of its own columns alone
        weight = result.source(Site(site.at, "weight"))
        assert ops.is_call(weight, "dequantize")
        assert ops.is_call(ops.tensor(weight, "codes"), "unpack")
    scales = [
        result.table.get(Site.parse(f"up.0.conv_shortcut/conv2d{tail}:weight"), Codes).qparams.scale
        for tail in ("", "~split-skips.1")
    ]
    assert not torch.equal(*scales)
    assert not [name for name in result.weights() if name.endswith("conv_shortcut.weight")]


def test_both_arms_learn_their_codes_under_the_regulariser_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """The published code learns the second arm without it: its weights never settle, and are cut off at the end."""
    seen = list[tuple[int, Annealing]]()
    honest = round_weights.annealed

    def watched(problem: Reconstruction, start: Tensor, how: Annealing) -> Tensor:
        seen.append((len(problem.weight), how))
        return honest(problem, start, how)

    monkeypatch.setattr(round_weights, "annealed", watched)
    options = {"method": "adaround", "rows": 64, "iterations": 30, "rate": 0.1}
    before, ctx = program_before("round-weights", "shifts"), context("shifts")
    after = run_step(create("round-weights", options), before, ctx)
    learned, ways = after.table, {each.at: each.rule for each in after.log[-1].applied}
    nearest = run_step(create("round-weights", {"method": "nearest"}), before, ctx).table
    assert len(seen) == list(ways.values()).count("adaround")
    assert {how for _, how in seen} == {Annealing(iterations=30, rate=0.1)}
    arms = [Site(site.at, "weight") for site in before.table.of(SkipArm)]
    moved = [not torch.equal(learned.of(Codes)[arm].packed, nearest.of(Codes)[arm].packed) for arm in arms]
    assert len(arms) > 1
    assert {ways[arm.at] for arm in arms} == {"adaround"}
    assert sum(moved) > len(arms) / 2


# --- how it is shown


def test_the_picture_keeps_the_arc_of_a_skip_whose_concatenation_is_gone() -> None:
    for program in (split(skipping(normed=True)), split(skipping(normed=False))):
        (arc,) = u_shape(program).arcs
        assert [str(at) for at in arc.target.layers][-2:] == ["last/conv2d", "last/conv2d~split-skips.1"]
        assert "skip arm of block/cat#4" in picture(program)


def test_an_arc_is_drawn_from_where_the_skip_is_made_also_when_it_is_quantized() -> None:
    program = split(skipping(normed=False))
    spec = QuantSpec(8)
    planned = {
        Site(node.meta["address"], arg): Planned(spec if arg == "input" else QuantSpec(4, "symmetric"), "all")
        for node in program.calls("conv2d")
        for arg in ("input", "weight")
    }
    table = program.table.put_all(planned)
    for site in planned:
        if site.arg == "input":
            channels = program.source(site).meta["val"].shape[1]
            table = table.put(site, _range(channels))
    steps = registry.pipeline(
        [("round-weights", {"method": "nearest"}), ("insert-qdq", {}), ("lower-reference", {})]
    )
    ready = replace(program, table=table, facts=program.facts | {PLANNED})
    (before,), (after,) = u_shape(program).arcs, u_shape(steps.run(ready, PassContext())).arcs
    assert (before.source.name, before.target.name) == (after.source.name, after.target.name)


def _range(channels: int) -> Range:
    ones = torch.ones(1, channels)
    return Range(-ones, ones, ones * 0, ones, torch.tensor([96]), 1)
