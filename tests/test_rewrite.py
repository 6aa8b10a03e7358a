"""Patterns, the Rewriter and the passes made of rules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import fx
from torch._ops import OpOverload
from toys import toy

from dmqfx.checking.probes import draw, outputs
from dmqfx.errors import RewriteError
from dmqfx.graph import ops
from dmqfx.graph.address import Address, Site
from dmqfx.graph.journal import Journal
from dmqfx.graph.pattern import Outcome, Pattern, RewritePass, Rule, p, rule
from dmqfx.graph.pipeline import PassContext, Preserves, run_step
from dmqfx.graph.program import Program
from dmqfx.graph.rewrite import Refuse, Rewriter

aten = torch.ops.aten
SILU, CONV1 = Address("down", "silu"), Address("down.conv1", "conv2d")


@pytest.fixture
def rw() -> Rewriter:
    return Rewriter(toy(), "my-pass", Journal())


def found(pattern: Pattern, node: fx.Node) -> dict[str, fx.node.Argument] | None:
    captures: dict[str, fx.node.Argument] = {}
    return captures if pattern.match(node, captures) else None


def text(program: Program) -> str:
    return program.gm.code


# --- patterns


def test_what_a_pattern_does_not_mention_it_does_not_constrain() -> None:
    padded, strided = toy().node("conv_in/conv2d"), toy().node("downsample/conv2d")
    assert found(p.conv2d(), padded) == found(p.conv2d(), strided) == {}


def test_a_literal_matches_what_equals_it_written_out_or_left_to_the_default() -> None:
    node = toy().node("conv_in/conv2d")
    assert found(p.conv2d(padding=p.value([1, 1])), node) is not None
    assert found(p.conv2d(stride=p.value([1, 1])), node) is not None
    assert found(p.conv2d(padding=p.value([0, 0])), node) is None
    assert found(p.conv2d(groups=p.value(1)), node) is not None
    assert found(p.conv2d(groups=p.value(True)), node) is None


def test_captures_carry_schema_names_whatever_the_call_spells() -> None:
    program = toy()
    captures = found(p.conv2d(input=p.any("x"), weight=p.attr("w")), program.node("down.conv1/conv2d"))
    assert captures is not None
    assert captures["x"] is program.node("down/silu")
    assert captures["w"].target == "down.conv1.weight"


def test_attr_matches_constants_and_nothing_computed() -> None:
    node = toy().node("down/add")
    assert found(p.add(self=p.any(), other=p.any()), node) is not None
    assert found(p.add(self=p.attr()), node) is None


def test_a_name_used_twice_must_capture_the_same_value() -> None:
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    twice = p.mul(self=p.any("same"), other=p.any("same"))
    assert found(twice, graph.call_function(aten.mul.Tensor, (x, x))) == {"same": x}
    assert found(twice, graph.call_function(aten.mul.Tensor, (x, y))) is None


def test_one_of_matches_each_of_its_operators() -> None:
    either = p.one_of("silu", "gelu")
    assert [found(either, toy().node(at)) for at in ("down/silu", "mid/gelu", "mid/add")] == [{}, {}, None]


def test_an_argument_that_only_other_operators_have_does_not_match() -> None:
    assert found(p.one_of("silu", "conv2d", weight=p.any()), toy().node(SILU)) is None


def test_an_argument_that_no_overload_has_is_a_mistake_of_the_pattern() -> None:
    with pytest.raises(TypeError, match=r"conv2d has no argument 'wieght'; did you mean 'weight'\?"):
        p.conv2d(wieght=p.attr("w"))
    assert p.an_operator_of_somebody_else(x=p.any()).names() == frozenset()


def test_a_parameter_that_the_pattern_does_not_capture_is_a_mistake_of_the_rule() -> None:
    with pytest.raises(TypeError, match=r"scale: its pattern captures no 'wight'; did you mean 'weight'\?"):

        @rule(p.linear(input=p.any("x"), weight=p.attr("weight")))
        def scale(rw: Rewriter, root: fx.Node, wight: fx.Node) -> Outcome:
            return None


def test_an_interior_operation_with_another_reader_is_refused_and_the_reader_named(rw: Rewriter) -> None:
    @rule(p.cat(tensors=p.any("arms")).as_("unused"))
    def never(rw: Rewriter, arms: fx.Node) -> Outcome:
        return None

    @rule(p.group_norm(input=p.add().as_("sum")))
    def after_sum(rw: Rewriter, sum: fx.Node) -> Outcome:
        return sum

    assert never.try_at(rw, rw.node(Address("", "cat"))) is None
    read_once, read_twice = Address("down.norm2", "group_norm"), Address("mid.norm2", "layer_norm")
    assert isinstance(after_sum.try_at(rw, rw.node(read_once)), fx.Node)

    @rule(p.layer_norm(input=p.add().as_("sum")))
    def normed_sum(rw: Rewriter, sum: fx.Node) -> Outcome:
        return sum

    outcome = normed_sum.try_at(rw, rw.node(read_twice))
    assert isinstance(outcome, Refuse)
    assert outcome.reason == "mid/add is also read by mid/add#1"


def test_only_readers_outside_the_match_are_other_readers(rw: Rewriter) -> None:
    x = rw.node(Address("conv_in", "conv2d"))

    def call(target: OpOverload, *args: fx.Node) -> fx.Node:
        node = rw.graph.call_function(target, args)
        node.meta["address"] = Address("made", target._schema.name.partition("::")[2])
        return node

    @rule(p.add(self=p.mul(self=p.silu().as_("inner"))))
    def never(rw: Rewriter, inner: fx.Node) -> Outcome:
        return Refuse("all of it was matched")

    with rw.graph.inserting_before(rw.graph.output_node()):
        inner = call(aten.silu.default, x)
        root = call(aten.add.Tensor, call(aten.mul.Tensor, inner, inner), inner)
        assert never.try_at(rw, root) == Refuse("all of it was matched")
        call(aten.relu.default, inner)
        assert never.try_at(rw, root) == Refuse("made/silu is also read by made/relu", inner)


# --- the rewriter


def test_like_changes_the_named_argument_and_keeps_the_rest_and_the_address(rw: Rewriter) -> None:
    old = rw.node(Address("downsample", "conv2d"))
    with rw.before(old):
        new = rw.like(old, padding=[0, 0])
    assert {**ops.args(old), "padding": [0, 0]} == ops.args(new)
    assert new.meta["address"] == old.meta["address"]
    assert tuple(new.meta["val"].shape) == (2, 8, 3, 3)


def test_a_new_operation_is_addressed_beside_the_one_it_is_made_for(rw: Rewriter) -> None:
    node = rw.node(SILU)
    with rw.before(node):
        made = [
            rw.call(aten.mul.Tensor, near=node, self=ops.tensor(node, "self"), other=0.5) for _ in range(2)
        ]
    assert [str(each.meta["address"]) for each in made] == ["down/mul~my-pass.1", "down/mul~my-pass.2"]
    assert made[0].meta["val"].shape == node.meta["val"].shape


def test_an_argument_that_the_schema_lacks_is_refused_with_the_schema(rw: Rewriter) -> None:
    with pytest.raises(TypeError, match=r"no argument \['scale'\].*aten::silu\(Tensor self\)"):
        rw.call(aten.silu.default, near=rw.node(SILU), self=rw.node(SILU), scale=2.0)
    with pytest.raises(TypeError, match="needs 'weight'"):
        rw.call(aten.conv2d.default, near=rw.node(SILU), input=rw.node(SILU))


def test_a_new_weight_leaves_the_other_readers_of_the_old_one_alone(rw: Rewriter) -> None:
    """Two layers share a weight; one is doubled."""
    conv, other = rw.node(CONV1), rw.node(Address("up.1.conv1", "conv2d"))
    with rw.before(other):
        shared = rw.like(other, input=ops.tensor(conv, "input"), weight=ops.tensor(conv, "weight"))
    rw.replace(other, shared)
    with rw.before(conv):
        rw.replace(conv, rw.like(conv, weight=rw.value(ops.tensor(conv, "weight")) * 2))
    after = rw.finish()
    weights = [
        after.constant_at(Site(Address.parse(at), "weight"))
        for at in ("down.conv1/conv2d", "up.1.conv1/conv2d")
    ]
    torch.testing.assert_close(weights[0], 2 * weights[1], rtol=0, atol=0)
    assert weights[1].data_ptr() == toy().weights()["down.conv1.weight"].data_ptr()


def test_a_replaced_weight_keeps_its_name(rw: Rewriter) -> None:
    conv = rw.node(CONV1)
    with rw.before(conv):
        rw.replace(conv, rw.like(conv, weight=rw.value(ops.tensor(conv, "weight")) * 2))
    after = rw.finish()
    assert set(after.weights()) == set(toy().weights())


def test_a_fork_cannot_touch_its_original() -> None:
    program = toy()
    before, weights = text(program), {name: w.clone() for name, w in program.weights().items()}
    rw = Rewriter(program, "my-pass", Journal())
    for node in list(rw.graph.nodes):
        if ops.is_call(node, "silu"):
            with rw.before(node):
                rw.replace(node, rw.call(aten.relu.default, near=node, self=ops.tensor(node, "self")))
        if ops.is_call(node, "conv2d", "linear"):
            with rw.before(node):
                rw.replace(node, rw.like(node, weight=rw.value(ops.tensor(node, "weight")) * 0))
    after = rw.finish()
    assert text(after) != before
    assert text(program) == before
    for name, weight in program.weights().items():
        assert torch.equal(weight, weights[name])


def test_finish_drops_dead_code_and_constants_that_nothing_reads(rw: Rewriter) -> None:
    node = rw.node(SILU)
    rw.replace(node, ops.tensor(node, "self"))
    rw.constant("idle", torch.ones(3))
    after = rw.finish()
    assert SILU not in after
    assert "idle" not in after.weights()


def test_redirect_moves_one_reader_only(rw: Rewriter) -> None:
    norm = rw.node(Address("mid.norm1", "layer_norm"))
    query = rw.node(Address("mid.to_q", "linear"))
    with rw.before(query):
        half = rw.call(aten.mul.Tensor, near=query, self=norm, other=0.5)
    rw.redirect(query, norm, half)
    assert ops.tensor(query, "input") is half
    assert len(norm.users) == 3  # to_k, to_v and the product


def test_a_computed_value_is_not_a_constant(rw: Rewriter) -> None:
    with pytest.raises(
        RewriteError, match="my-pass: down/silu is computed from the inputs, it is no constant"
    ):
        rw.value(rw.node(SILU))


def test_a_graph_that_reads_before_it_computes_is_refused(rw: Rewriter) -> None:
    early, late = rw.node(Address("conv_in", "conv2d")), rw.node(Address("conv_out", "conv2d"))
    with rw.before(early):
        wrong = rw.call(aten.silu.default, near=early, self=late)
    rw.graph.output_node().replace_input_with(late, wrong)
    with pytest.raises(RewriteError, match="my-pass left a broken graph"):
        rw.finish()


# --- passes made of rules


@rule(p.silu(self=p.any("x")))
def silu_to_product(rw: Rewriter, root: fx.Node, x: fx.Node) -> Outcome:
    """silu(x)  ->  x * sigmoid(x)."""
    if root.meta["address"].path == "up.0":
        return Refuse("not up here")
    gate = rw.call(aten.sigmoid.default, near=root, self=x)
    return rw.call_at(aten.mul.Tensor, root.meta["address"], self=x, other=gate)


@dataclass(frozen=True)
class OpenSilu(RewritePass):
    """silu as a product."""

    preserves: ClassVar[Preserves] = Preserves.EXACT
    rules: ClassVar[tuple[Rule, ...]] = (silu_to_product,)


def run(step: RewritePass, fuel: int | None = None) -> tuple[Program, Journal]:
    journal = Journal(fuel=fuel)
    return step.run(toy(), PassContext(journal=journal)), journal


def test_a_pass_fires_wherever_its_rules_match_and_records_where_they_refuse() -> None:
    after, journal = run(OpenSilu())
    assert len(list(after.calls("sigmoid"))) == len(journal.applied) == 8
    assert {(str(r.at), r.reason) for r in journal.refused} == {
        (f"up.0/silu{k}", "not up here") for k in ("", "#1", "#2")
    }
    inputs = draw(toy(), torch.Generator().manual_seed(0))[0]
    torch.testing.assert_close(outputs(after, inputs), outputs(toy(), inputs), rtol=1e-4, atol=1e-5)


def test_a_refusal_changes_nothing() -> None:
    @rule(p.any())
    def refuse(rw: Rewriter, root: fx.Node) -> Outcome:
        return Refuse("on principle")

    @dataclass(frozen=True)
    class RefuseAll(RewritePass):
        preserves: ClassVar[Preserves] = Preserves.BITWISE
        rules: ClassVar[tuple[Rule, ...]] = (refuse,)

    after, journal = run(RefuseAll())
    assert text(after) == text(toy())
    assert [r.at for r in journal.refused] == [node.meta["address"] for node in toy().calls()]
    assert not journal.applied


@pytest.mark.parametrize("fuel", range(9))
def test_fuel_n_is_a_prefix_of_fuel_n_plus_1(fuel: int) -> None:
    (less, shorter), (more, longer) = run(OpenSilu(), fuel), run(OpenSilu(), fuel + 1)
    assert shorter.applied == longer.applied[:fuel]
    assert len(list(less.calls("sigmoid"))) == min(fuel, 8)
    assert len(list(more.calls("sigmoid"))) == min(fuel + 1, 8)


def test_without_fuel_the_graph_is_as_it_was() -> None:
    assert text(run(OpenSilu(), 0)[0]) == text(toy())


def test_rules_that_never_come_to_an_end_are_stopped() -> None:
    @rule(p.silu(self=p.any("x")))
    def again(rw: Rewriter, root: fx.Node, x: fx.Node) -> Outcome:
        return rw.like(root)

    @dataclass(frozen=True)
    class RunForever(RewritePass):
        preserves: ClassVar[Preserves] = Preserves.BITWISE
        rules: ClassVar[tuple[Rule, ...]] = (again,)

    with pytest.raises(RewriteError, match="run-forever does not come to an end"):
        run(RunForever())


def test_the_log_line_counts_what_was_done() -> None:
    after = run_step(OpenSilu(), toy(), PassContext())
    assert str(after.log[-1]).split()[:5] == "open-silu 8 applied 3 refused".split()
