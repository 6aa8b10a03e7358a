"""Planted bugs, at least one in every built-in pass: the verifier must find each and say where it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from mutants_attention import MUTANTS as OF_ATTENTION
from mutants_bias import MUTANTS as OF_BIAS
from mutants_blocks import MUTANTS as OF_BLOCKS
from mutants_hoisting import MUTANTS as OF_HOISTING
from mutants_kernels import MUTANTS as OF_KERNELS
from mutants_sensitivity import MUTANTS as OF_SENSITIVITY
from mutants_skips import MUTANTS as OF_SKIPS
from mutants_steps import MUTANTS as OF_STEPS
from planting import (
    Function,
    Mutant,
    Plant,
    derived,
    edited,
    nothing,
    operands,
    patched,
    planted,
    spoiled,
    with_constant,
    with_entry,
    with_rule,
    without_entry,
)
from torch import Tensor, fx
from torch._ops import OpOverload

from dmqfx.graph import channelwise, ops, timesteps
from dmqfx.graph.address import Address
from dmqfx.graph.inputs import Input
from dmqfx.graph.journal import Journal
from dmqfx.graph.modules import clone
from dmqfx.graph.pattern import Outcome, p, rule
from dmqfx.graph.program import Program
from dmqfx.graph.registry import passes
from dmqfx.graph.rewrite import Refuse, Rewriter
from dmqfx.graph.table import ChannelScale, Codes, LayerPair, Planned, Range, SkipConcat
from dmqfx.numbers.observers import Observer
from dmqfx.numbers.packing import pack
from dmqfx.numbers.quant import QParams, QuantSpec

aten = torch.ops.aten


# --- canonicalize


@rule(p.div(self=p.add().as_("x"), other=p.value(2.0)))
def drop_any_factor(rw: Rewriter, x: fx.Node) -> Outcome:
    """x / 2.0  ->  x."""
    return x


@rule(p.to(self=p.any("x")))
def drop_any_cast(rw: Rewriter, x: fx.Node) -> Outcome:
    """x.double()  ->  x."""
    return x


@rule(p.transpose(self=p.any("x")))
def drop_transposition(rw: Rewriter, x: fx.Node) -> Outcome:
    """x.transpose(1, 2)  ->  x."""
    return x


@rule(p.group_norm(eps=p.value(1e-2)))
def lose_eps(rw: Rewriter, root: fx.Node) -> Outcome:
    """group_norm(x, eps=1e-2)  ->  group_norm(x)."""
    return rw.like(root, eps=1e-5)


@rule(p.conv2d(stride=p.value([2, 2])))
def lose_stride(rw: Rewriter, root: fx.Node) -> Outcome:
    """conv2d(x, stride=2)  ->  conv2d(x)."""
    return rw.like(root, stride=[1, 1])


@rule(p.conv2d(padding=p.value([2, 2]), dilation=p.value([2, 2])))
def lose_dilation(rw: Rewriter, root: fx.Node) -> Outcome:
    """conv2d(x, padding=2, dilation=2)  ->  conv2d(x, padding=1): the shape stays."""
    return rw.like(root, padding=[1, 1], dilation=[1, 1])


@rule(p.linear(input=p.any("x"), weight=p.any("w"), bias=p.attr("b")))
def lose_bias(rw: Rewriter, root: fx.Node) -> Outcome:
    """linear(x, w, b)  ->  linear(x, w)."""
    return rw.like(root, bias=None) if root.meta["address"].path == "mid.to_out" else None


def swap_arms(rw: Rewriter, node: fx.Node) -> fx.Node | None:
    """cat(a, b)  ->  cat(b, a)."""
    first, second = ops.args(node)["tensors"]
    return rw.like(node, tensors=[second, first]) if str(node.meta["address"]) == "/cat#1" else None


# --- flag-skips and plan-sites


def swap_counts(entry: SkipConcat) -> SkipConcat:
    return replace(entry, deep=entry.skip, skip=entry.deep)


def swap_roles(entry: SkipConcat) -> SkipConcat:
    return replace(entry, deep=entry.skip, skip=entry.deep, skip_last=not entry.skip_last)


def swap_variances(entry: SkipConcat) -> SkipConcat:
    return replace(entry, deep_variance=entry.skip_variance, skip_variance=entry.deep_variance)


def call_uneven(entry: SkipConcat) -> SkipConcat:
    return replace(entry, uneven=True)


def refuse_a_skip(honest: Function) -> Function:
    return lambda graph, node: Refuse("siblings") if node.name == "cat_2" else honest(graph, node)


def without_the_rules(honest: Function) -> Function:
    return lambda policy, operations, steps: honest(replace(policy, rules=()), operations, steps)


def without_the_last(honest: Function) -> Function:
    return lambda program: honest(program)[:-1]


def without_groups(entry: Planned) -> Planned:
    return replace(entry, spec=replace(entry.spec, boundaries=()))


# --- insert-observers and freeze-observers


class ClampingObserver(Observer):
    """An observer that lets its view of the range reach the values."""

    def forward(self, x: Tensor, group: Tensor | None = None) -> Tensor:
        return x.clamp(-2, 2)


def observer_without_groups(honest: Function) -> Function:
    return lambda site, axis, boundaries: honest(site, axis)


def other_edges(honest: Function) -> Function:
    return lambda self, edges, near: honest(self, tuple(edge + 50 for edge in edges), near)


def leave_one_unobserved(before: Program, after: Program) -> Program:
    rw = Rewriter(after, "insert-observers", Journal())
    reader = rw.node(Address.parse("mid.to_v/linear"))
    seen = ops.tensor(reader, "input")
    rw.redirect(reader, seen, seen.all_input_nodes[0])
    return rw.finish()


def next_group(entry: Range) -> Range:
    return replace(entry, low=entry.low.roll(1, 0), high=entry.high.roll(1, 0))


def shy_range(entry: Range) -> Range:
    return replace(entry, high=entry.high - 0.01 * (entry.high - entry.low))


def wide_range(entry: Range) -> Range:
    return replace(entry, low=entry.low.amin().expand_as(entry.low).contiguous())


def mean_and_variance_swapped(entry: Range) -> Range:
    return replace(entry, mean=entry.variance, variance=entry.mean.abs())


def rows_instead_of_values(entry: Range) -> Range:
    return replace(entry, count=entry.count // 16)


def wide_in_one_group(entry: Range) -> Range:
    return replace(entry, high=entry.high * torch.tensor([1.0, 1.0, 3.0, 1.0])[:, None])


def only_the_first_reader(honest: Function) -> Function:
    return lambda node: list(honest(node))[:1]


# --- pair-layers and learn-scaling


def stay_float(entry: Planned) -> Planned:
    return replace(entry, spec=None)


def fewer_bits(entry: Planned) -> Planned:
    return replace(entry, spec=replace(entry.spec, bits=3))


def claim_the_norm(entry: LayerPair) -> LayerPair:
    return replace(entry, producer=Address.parse("down.norm1/group_norm"), reason="")


def claim_the_query(entry: LayerPair) -> LayerPair:
    return replace(entry, producer=Address.parse("mid.to_q/linear"))


def leave_one_out(entry: LayerPair) -> LayerPair:
    return replace(entry, readers=entry.readers[:-1])


def claim_a_producer(entry: LayerPair) -> LayerPair:
    return replace(entry, producer=Address.parse("down/add#1"), reason="")


def dead_channel(honest: Function) -> Function:
    return lambda x, w, exponent: honest(x, w, exponent).index_fill(0, torch.tensor([2]), 0.0)


def one_for_each_output(honest: Function) -> Function:
    return lambda x, w, exponent: honest(x, w, exponent).repeat(2)


# --- apply-scaling and absorb-scaling


def inverted(honest: Function) -> Function:
    return lambda shape, gamma: honest(shape, 1 / gamma)


def twice(honest: Function) -> Function:
    return lambda shape, gamma: honest(shape, gamma).square()


def along_the_outputs(honest: Function) -> Function:
    def factor(shape: Sequence[int], gamma: Tensor) -> Tensor:
        square = shape[0] == gamma.numel() and len(shape) == 2
        return gamma[:, None] if square else honest(shape, gamma)

    return factor


def first_group_for_all(honest: Function) -> Function:
    def factor(shape: Sequence[int], gamma: Tensor) -> Tensor:
        return honest(shape, gamma[: shape[1]].repeat(gamma.numel() // shape[1]))

    return factor


def one_channel_off(honest: Function) -> Function:
    def factor(shape: Sequence[int], gamma: Tensor) -> Tensor:
        right = honest(shape, gamma)
        off = torch.ones(shape[1], dtype=gamma.dtype).index_fill(0, torch.tensor([3]), 1.001)
        return right * off.view(1, -1, 1, 1) if tuple(shape[:2]) == (12, 8) and len(shape) == 4 else right

    return factor


def one_reader_divided(honest: Function) -> Function:
    def divide(rw: Rewriter, pair: LayerPair, gamma: Tensor, axis: int) -> None:
        honest(rw, replace(pair, readers=pair.readers[:1]), gamma, axis)

    return divide


def same_range(honest: Function) -> Function:
    return lambda seen, gamma: seen


def same_moments(honest: Function) -> Function:
    return lambda seen, gamma: replace(honest(seen, gamma), mean=seen.mean, variance=seen.variance)


def forget_the_bias(honest: Function) -> Function:
    def fold(rw: Rewriter, found: channelwise.Absorber, factor: Tensor) -> None:
        weight = rw.value(ops.tensor(found.node, "weight"))
        factors = found.spread(factor).view(-1, *[1] * (weight.dim() - 1))
        with rw.before(found.node):
            rw.replace(found.node, rw.like(found.node, weight=weight * factors))

    return fold


def forget_half_the_bias(honest: Function) -> Function:
    def fold(rw: Rewriter, found: channelwise.Absorber, factor: Tensor) -> None:
        bias = rw.value(ops.tensor(found.node, "bias"))
        scaled = (bias * found.spread(factor))[: len(bias) // 2]
        honest(rw, found, factor)
        node = rw.node(found.node.meta["address"])
        with rw.before(node):
            rw.replace(node, rw.like(node, bias=torch.cat([scaled, bias[len(bias) // 2 :]])))

    return fold


def fold_the_inverse(honest: Function) -> Function:
    return lambda rw, found, factor: honest(rw, found, 1 / factor)


def other_rows(honest: Function) -> Function:
    return lambda self, factor: honest(self, factor).flip(0)


@rule(p.div(other=p.attr("gamma")))
def leave_the_division(rw: Rewriter, root: fx.Node, gamma: fx.Node) -> Outcome:
    """The honest rule, but the division stays, spelt as a product."""
    honest = passes()["absorb-scaling"].rules[0].function(rw, root)
    if not isinstance(honest, fx.Node):
        return honest
    return rw.call_at(aten.mul.Tensor, root.meta["address"], self=honest, other=1 / rw.value(gamma))


# --- round-weights


def codes(change: Callable[[Tensor, QuantSpec, Codes], Codes]) -> Plant:
    """round-weights with the codes of each weight changed."""

    def wrong(honest: Function) -> Function:
        return lambda weight, spec, *norm: change(weight, spec, honest(weight, spec, *norm))

    return patched("nearest", wrong)


def swap_nibbles(weight: Tensor, spec: QuantSpec, entry: Codes) -> Codes:
    return replace(entry, packed=(entry.packed << 4) | (entry.packed >> 4)) if spec.bits <= 4 else entry


def towards_zero(weight: Tensor, spec: QuantSpec, entry: Codes) -> Codes:
    params = entry.qparams
    scale, zero_point = (t.view(-1, *[1] * (weight.dim() - 1)) for t in (params.scale, params.zero_point))
    cut = ((weight / scale).trunc() + zero_point).clamp(params.qmin, params.qmax)
    return replace(entry, packed=pack(cut.to(torch.int8 if params.qmin < 0 else torch.uint8), spec.bits))


def one_scale_for_all(weight: Tensor, spec: QuantSpec, entry: Codes) -> Codes:
    scale = entry.qparams.scale
    return replace(entry, qparams=replace(entry.qparams, scale=scale.amax().expand_as(scale).contiguous()))


def ranges(change: Callable[[QParams], QParams]) -> Plant:
    """round-weights with the parameters of each weight changed before it is rounded: the codes fit them."""
    return patched("search_range", lambda honest: lambda *given, **how: change(honest(*given, **how)))


def one_step_for_all(found: QParams) -> QParams:
    return replace(found, scale=found.scale.amax().expand_as(found.scale).contiguous())


def a_percent_more(found: QParams) -> QParams:
    return replace(found, scale=found.scale * 1.01)


def worst_of_the_search(honest: Function) -> Function:
    def search(weight: Tensor, spec: QuantSpec, **how: float) -> QParams:
        widest = honest(weight, replace(spec, range="minmax"), **how)
        return replace(widest, scale=widest.scale * (0.2 if spec.range == "mse" else 1.0))

    return search


def one_level_more(weight: Tensor, spec: QuantSpec, entry: Codes) -> Codes:
    return replace(entry, qparams=replace(entry.qparams, qmax=entry.qparams.qmax + 1))


def unsigned(weight: Tensor, spec: QuantSpec, entry: Codes) -> Codes:
    width = entry.qparams.qmax - entry.qparams.qmin
    return replace(entry, qparams=replace(entry.qparams, qmin=0, qmax=width))


# --- insert-qdq


def params(change: Callable[[QParams], QParams]) -> Plant:
    """insert-qdq with the parameters of each activation changed."""

    def wrong(honest: Function) -> Function:
        return lambda *given: change(honest(*given))

    return patched("params_from_range", wrong)


def negative_zero_point(found: QParams) -> QParams:
    return replace(found, zero_point=found.qmax - found.zero_point) if found.qmin == 0 else found


def one_code_less(found: QParams) -> QParams:
    return replace(found, qmax=found.qmax - 1)


def coarse_steps(found: QParams) -> QParams:
    return replace(found, scale=found.scale * 2)


def half_a_percent_more(found: QParams) -> QParams:
    return replace(found, scale=found.scale * 1.005)


def in_group(k: int, change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A parameter [G, C] with one row changed."""
    return lambda rows: torch.cat([rows[:k], change(rows[k : k + 1]), rows[k + 1 :]])


def a_thousandth(value: Tensor) -> Tensor:
    return value * 1.001


def one_more(value: Tensor) -> Tensor:
    return value + 1


def half_a_timestep_later(edges: Tensor) -> Tensor:
    return edges + edges.new_tensor([0.0, 0.0, 0.5])


def one_channel_for_all(found: QParams) -> QParams:
    one = {name: getattr(found, name)[:, :1] for name in ("scale", "zero_point")}
    return replace(found, **one) if found.scale.shape[1] > 1 else found


def group_of_the_first(honest: Function) -> Function:
    def make(self: timesteps.GroupIndex, edges: tuple[float, ...], near: fx.Node) -> fx.Node:
        rw, group = self._rw, honest(self, edges, near)
        with rw.graph.inserting_after(group):
            first = rw.call(aten.slice.Tensor, near=near, self=group, dim=0, start=0, end=1)
        with rw.graph.inserting_after(first):
            return rw.call(aten.expand_as.default, near=near, self=first, other=group)

    return make


def inverse_step(honest: Function) -> Function:
    def call(self: Rewriter, target: OpOverload, **named: object) -> fx.Node:
        scale = named.get("scale")
        if "x" in named and isinstance(scale, fx.Node) and str(scale.target).endswith("_step"):
            step, whole = self.value(scale), self.value(scale).mean(1, keepdim=True)
            named["scale"] = self.constant("step", whole.square() / step)
        return honest(self, target, **named)

    return call


def leave_a_reader(honest: Function) -> Function:
    def redirect(self: Rewriter, reader: fx.Node, old: fx.Node, new: fx.Node) -> None:
        if reader.meta["address"].path != "mid.to_k":
            honest(self, reader, old, new)

    return redirect


def always_equal(honest: Function) -> Function:
    return lambda a, b: True


def stale_zero_point(rw: Rewriter, node: fx.Node) -> fx.Node | None:
    if node.meta["address"].path != "up.0.conv2" or ops.args(node)["group"] is None:
        return None
    return rw.like(node, zero_point=rw.value(ops.tensor(node, "zero_point")) - 1)


def transposed_codes(rw: Rewriter, node: fx.Node) -> fx.Node | None:
    if node.meta["address"].path != "mid.to_q" or not ops.is_call(ops.tensor(node, "codes"), "unpack"):
        return None
    return rw.call(aten.t.default, near=node, self=rw.like(node))


def other_sign(rw: Rewriter, node: fx.Node) -> fx.Node | None:
    return (
        rw.like(node, signed=not ops.args(node)["signed"]) if node.meta["address"].path == "mid.out" else None
    )


# --- lower-simulate and lower-reference


def zeros(rw: Rewriter, found: Mapping[str, fx.node.Argument]) -> fx.node.Argument:
    return rw.constant("zeros", torch.zeros_like(rw.value(found["x_zero_point"])))


def lose_dilation_later(rw: Rewriter, node: fx.Node) -> fx.Node | None:
    return (
        rw.like(node, padding=[1, 1], dilation=[1, 1]) if node.meta["address"].path == "up.0.conv2" else None
    )


def add_bias_again(rw: Rewriter, node: fx.Node) -> fx.Node | None:
    if node.meta["address"].path != "mid.proj":
        return None
    return rw.call(aten.add.Tensor, near=node, self=rw.like(node), other=ops.args(node)["bias"])


def folded(change: Callable[[Tensor], Tensor]) -> Plant:
    """lower-simulate with one folded weight changed."""

    def wrong(honest: Function) -> Function:
        def constant(self: Rewriter, name: str, value: Tensor) -> fx.Node:
            return honest(
                self, name, change(value) if name.startswith("up.1.conv_shortcut.weight") else value
            )

        return constant

    return patched("constant", wrong, where=Rewriter)


def first_scale(rw: Rewriter, node: fx.Node) -> fx.Node | None:
    scale = rw.value(ops.tensor(node, "w_scale"))
    return rw.like(node, w_scale=scale[:, :1]) if node.meta["address"].path == "up.0.conv2" else None


MUTANTS: tuple[Mutant, ...] = (
    *planted(
        "canonicalize",
        {
            "a factor of 2 is dropped as if it were 1": (with_rule(drop_any_factor), "up.1/div"),
            "a cast to float64 is dropped": (with_rule(drop_any_cast), "time_embedding/to#1"),
            "a transposition is dropped": (with_rule(drop_transposition), "mid/transpose"),
            "an epsilon is lost": (with_rule(lose_eps), "down.norm1/group_norm"),
            "a stride is lost": (with_rule(lose_stride), "downsample/conv2d"),
            "a padding and a dilation are lost": (with_rule(lose_dilation), "down.conv2/conv2d"),
            "a bias is lost": (with_rule(lose_bias), "mid.to_out/linear"),
            "the arms of a concatenation are swapped": (edited("cat", swap_arms), ""),
        },
    ),
    *planted(
        "flag-skips",
        {
            "the counts of a skip are swapped": (with_entry("/cat:tensors", SkipConcat, swap_counts), "/cat"),
            "the arms of a skip change roles": (
                with_entry("/cat#1:tensors", SkipConcat, swap_roles),
                "/cat#1",
            ),
            "a skip is refused": (patched("_split", refuse_a_skip), "/cat#1"),
            "the variances of the arms are swapped": (
                with_entry("/cat#1:tensors", SkipConcat, swap_variances),
                "/cat#1",
            ),
            "an even skip is called uneven": (with_entry("/cat:tensors", SkipConcat, call_uneven), "/cat"),
        },
    ),
    *planted(
        "plan-sites",
        {
            "the policy's rules are ignored": (patched("resolve", without_the_rules), "conv_in/conv2d"),
            "the last operation is not planned": (patched("operations", without_the_last), "conv_out/conv2d"),
            "the groups of a site are lost": (
                with_entry("mid.out/linear:input", Planned, without_groups),
                "mid.out/linear",
            ),
        },
    ),
    *planted(
        "insert-observers",
        {
            "the observer changes the value": (
                patched("Observer", lambda honest: ClampingObserver),
                "time_embedding.linear_2/linear",
            ),
            "the observers ignore the groups": (
                patched("Observer", observer_without_groups),
                "time_embedding.linear_1/linear",
            ),
            "the groups have other edges": (
                patched("_make", other_edges, where=timesteps.GroupIndex),
                "time_embedding.linear_1/linear",
            ),
            "a reader of a shared input is not observed": (spoiled(leave_one_unobserved), "mid.to_v/linear"),
        },
    ),
    *planted(
        "freeze-observers",
        {
            "a range is that of the next group": (
                with_entry("mid.out/linear:input", Range, next_group),
                "mid.out/linear",
            ),
            "a range ends short of its maximum": (
                with_entry("mid.out/linear:input", Range, shy_range),
                "mid.out/linear",
            ),
            "a range is that of all channels": (
                with_entry("mid.out/linear:input", Range, wide_range),
                "mid.out/linear",
            ),
            "a mean and a variance are swapped": (
                with_entry("mid.out/linear:input", Range, mean_and_variance_swapped),
                "mid.out/linear",
            ),
            "rows are counted, not values": (
                with_entry("mid.out/linear:input", Range, rows_instead_of_values),
                "mid.out/linear",
            ),
            "only the first reader gets the range": (
                patched("readers", only_the_first_reader),
                "mid.to_k/linear",
            ),
        },
    ),
    *planted(
        "pair-layers",
        {
            "a reader of a shared input is left out": (
                with_entry("mid.to_q/linear:input", LayerPair, leave_one_out),
                "mid.to_q/linear",
            ),
            "a producer with other readers is claimed": (
                with_entry("downsample/conv2d:input", LayerPair, claim_a_producer),
                "downsample/conv2d",
            ),
            "a producer behind an activation is claimed": (
                with_entry("down.conv1/conv2d:input", LayerPair, claim_the_norm),
                "down.conv1/conv2d",
            ),
            "the query is said to scale the value": (
                with_entry("mid.to_out/linear:input", LayerPair, claim_the_query),
                "mid.to_out/linear",
            ),
            "a layer is passed over": (
                without_entry("mid.to_out/linear:input", LayerPair),
                "mid.to_out/linear",
            ),
            "a range is changed on the way": (
                with_entry("mid.to_k/linear:input", Range, shy_range),
                "mid.to_k/linear",
            ),
            "a site that was planned stays float": (
                with_entry("mid.to_out/linear:input", Planned, stay_float),
                "mid.to_out/linear",
            ),
        },
    ),
    *planted(
        "learn-scaling",
        {
            "the scale of a channel is zero": (
                patched("closed_form", dead_channel),
                "time_embedding.linear_1/linear",
            ),
            "the scale has other channels": (
                patched("closed_form", one_for_each_output),
                "time_embedding.linear_1/linear",
            ),
            "a pair is passed over": (
                without_entry("mid.to_out/linear:input", ChannelScale),
                "mid.to_out/linear",
            ),
            "a weight gets fewer bits on the way": (
                with_entry("mid.to_out/linear:weight", Planned, fewer_bits),
                "mid.to_out/linear",
            ),
        },
    ),
    *planted(
        "apply-scaling",
        {
            "the weight gets the inverse scale": (
                patched("column_factor", inverted),
                "time_embedding.linear_1/linear",
            ),
            "the weight gets the scale twice": (
                patched("column_factor", twice),
                "time_embedding.linear_1/linear",
            ),
            "the scale goes along the outputs": (
                patched("column_factor", along_the_outputs),
                "time_embedding.linear_2/linear",
            ),
            "every group of a convolution gets the first one's scale": (
                patched("column_factor", first_group_for_all),
                "down.conv2/conv2d",
            ),
            "one channel is off by a thousandth": (
                patched("column_factor", one_channel_off),
                "upsample/conv2d",
            ),
            "one reader of three is divided": (patched("_divide", one_reader_divided), "mid.to_q/linear"),
            "the ranges stay as they were": (
                patched("_divided", same_range),
                "time_embedding.linear_1/linear",
            ),
            "means and variances stay as they were": (
                patched("_divided", same_moments),
                "time_embedding.linear_1/linear",
            ),
            "a range grows in one group": (
                with_entry("mid.out/linear:input", Range, wide_in_one_group),
                "mid.out/linear",
            ),
        },
    ),
    *planted(
        "absorb-scaling",
        {
            "the bias is forgotten": (patched("_fold", forget_the_bias), "mid.to_q/div~apply-scaling.1"),
            "half the bias is forgotten": (
                patched("_fold", forget_half_the_bias),
                "mid.to_q/div~apply-scaling.1",
            ),
            "the inverse is folded": (patched("_fold", fold_the_inverse), "mid.to_q/div~apply-scaling.1"),
            "other rows are scaled": (
                patched("spread", other_rows, where=channelwise.Absorber),
                "mid.to_q/div~apply-scaling.1",
            ),
            "the division is left in place": (
                derived(rules=(leave_the_division,)),
                "mid.to_q/div~apply-scaling.1",
            ),
        },
    ),
    *planted(
        "absorb-scaling",
        {"codes of the old weights count as fresh": (derived(clears=frozenset()), "mid.to_v/linear")},
        meets="absorb-scaling late",
    ),
    *planted(
        "round-weights",
        {
            "the nibbles are swapped": (codes(swap_nibbles), "time_embedding.linear_1/linear"),
            "weights are cut off, not rounded": (codes(towards_zero), "time_embedding.linear_1/linear"),
            "the scale of a channel is that of the tensor": (
                codes(one_scale_for_all),
                "time_embedding.linear_1/linear",
            ),
            "the greatest code is one too great": (codes(one_level_more), "time_embedding.linear_1/linear"),
            "every channel has the widest one's steps": (
                ranges(one_step_for_all),
                "time_embedding.linear_1/linear",
            ),
            "steps are a hundredth too wide": (ranges(a_percent_more), "time_embedding.linear_1/linear"),
            "signed codes count as unsigned": (codes(unsigned), "time_embedding.linear_1/linear"),
        },
    ),
    *planted(
        "round-weights",
        {
            "the worst range of the search wins": (
                patched("search_range", worst_of_the_search),
                "mid.to_k/linear",
            )
        },
        policy="attention",
    ),
    *planted(
        "insert-qdq",
        {
            "the zero point has the wrong sign": (
                params(negative_zero_point),
                "time_embedding.linear_1/linear",
            ),
            "the greatest code is one too small": (params(one_code_less), "time_embedding.linear_1/linear"),
            "the steps are twice as wide as they need be": (
                params(coarse_steps),
                "time_embedding.linear_1/linear",
            ),
            "the steps are half a percent too wide": (
                params(half_a_percent_more),
                "time_embedding.linear_1/linear",
            ),
            "the zero point of one group is off by one": (
                with_constant("up.0.conv2.input_zero_point", in_group(1, one_more)),
                "up.0.conv2/conv2d",
            ),
            "the step of the last group is off by a thousandth": (
                with_constant("down.conv1.input_step", in_group(3, a_thousandth)),
                "down.conv1/conv2d",
            ),
            "an edge comes half a timestep late": (
                with_constant("timestep_boundaries", half_a_timestep_later),
                "time_embedding.linear_1/linear",
            ),
            "the whole batch gets the first sample's group": (
                patched("_make", group_of_the_first, where=timesteps.GroupIndex),
                "time_embedding.linear_1/linear",
            ),
            "the groups have other edges": (
                patched("_make", other_edges, where=timesteps.GroupIndex),
                "time_embedding.linear_1/linear",
            ),
            "the step takes the scale the wrong way round": (
                patched("call", inverse_step, where=Rewriter),
                "time_embedding.linear_1/linear",
            ),
            "one reader of three stays float": (
                patched("redirect", leave_a_reader, where=Rewriter),
                "mid.to_k/linear",
            ),
            "a dequantize has a stale zero point": (
                edited("dequantize", stale_zero_point),
                "up.0.conv2/conv2d",
            ),
            "codes are transposed": (edited("dequantize", transposed_codes), "mid.to_q/linear"),
            "signed codes are unpacked as unsigned": (edited("unpack", other_sign), "mid.out/linear"),
            "the arms of a concatenation are swapped": (edited("cat", swap_arms), "/cat#1"),
        },
    ),
    *planted(
        "insert-qdq",
        {
            "every channel gets the first one's scale": (
                params(one_channel_for_all),
                "up.0.conv_shortcut/conv2d",
            ),
            "readers with other parameters share a quantize": (
                patched("_equal", always_equal),
                "mid.to_k/linear",
            ),
        },
        policy="attention",
    ),
    *planted(
        "lower-simulate",
        {
            "a folded weight is off in its last digits": (
                folded(lambda w: w * (1 + 2**-21)),
                "up.1.conv_shortcut/dequantize~insert-qdq.2",
            ),
            "a folded weight lost its zero point": (
                folded(lambda w: w - w.amin()),
                "up.1.conv_shortcut/dequantize~insert-qdq.2",
            ),
            "the scale of the first group is off by a thousandth": (
                with_constant("up.0.conv2.input_scale", in_group(0, a_thousandth)),
                "",
            ),
        },
    ),
    *planted(
        "lower-reference",
        {
            "the zero point of the input is ignored": (
                operands(x_zero_point=zeros),
                "time_embedding.linear_1/linear",
            ),
            "the stride is lost": (patched("CONV_ARGUMENTS", lambda honest: honest[1:]), "downsample/conv2d"),
            "the groups are lost": (
                patched("CONV_ARGUMENTS", lambda honest: honest[:-1]),
                "down.conv2/conv2d",
            ),
            "the dilation is lost and the padding fits": (
                edited("qconv2d", lose_dilation_later),
                "up.0.conv2/conv2d",
            ),
            "the bias is added twice": (edited("qlinear", add_bias_again), "mid.proj/linear"),
            "the bias is lost": (operands(bias=nothing), "time_embedding.linear_1/linear"),
            "the first channel's scale counts for all": (edited("qconv2d", first_scale), "up.0.conv2/conv2d"),
            "the codes of the weight count as unsigned": (
                operands(signed=lambda rw, found: not found["signed"]),
                "time_embedding.linear_1/linear",
            ),
            "the group index is forgotten": (operands(group=nothing), "time_embedding.linear_1/linear"),
            "the zero point of the last group is off by one": (
                with_constant("up.0.conv2.input_zero_point", in_group(3, one_more)),
                "",
            ),
        },
    ),
    *OF_SKIPS,
    *OF_ATTENTION,
    *OF_STEPS,
    *OF_SENSITIVITY,
    *OF_BIAS,
    *OF_BLOCKS,
    *OF_HOISTING,
    *OF_KERNELS,
)


# --- a pass that changes what the program is called with


def _replaced(node: fx.Node, name: str) -> None:
    """A placeholder by one of another name."""
    with node.graph.inserting_before(node):
        new = node.graph.placeholder(name)
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def inputs(change: Callable[[fx.Node, fx.Node], object]) -> Plant:
    """The pass, and then something done to the placeholders of the sample and the timestep."""

    def spoil(before: Program, after: Program) -> Program:
        gm = clone(after.gm)
        change(*gm.graph.find_nodes(op="placeholder"))
        gm.recompile()
        return replace(after, gm=gm)

    return spoiled(spoil)


def drop(sample: fx.Node, timestep: fx.Node) -> None:
    """The timestep is a constant from now on."""
    with timestep.graph.inserting_before(timestep):
        ones = timestep.graph.call_function(aten.ones.default, ([2],))
    ones.meta = {**timestep.meta, "address": Address("", "ones")}
    timestep.replace_all_uses_with(ones)
    timestep.graph.erase_node(timestep)


def add(sample: fx.Node, timestep: fx.Node) -> None:
    with timestep.graph.inserting_after(timestep):
        timestep.graph.placeholder("guidance").meta["val"] = timestep.meta["val"]


def declare_one_more(before: Program, after: Program) -> Program:
    """What the program declares is changed, and the graph is not."""
    more = (*after.inputs.inputs, Input("guidance", ("B",)))
    return replace(after, inputs=replace(after.inputs, inputs=more))


MISCALLED: tuple[Mutant, ...] = (
    *planted(
        "canonicalize",
        {
            "an input is dropped": (inputs(drop), "placeholders: timestep is gone;"),
            "an input is added": (inputs(add), "placeholders: guidance is new;"),
            "an input is renamed": (
                inputs(lambda sample, timestep: _replaced(timestep, "t")),
                "placeholders: timestep is gone, t is new;",
            ),
            "the inputs change places": (
                inputs(lambda sample, timestep: timestep.append(sample)),
                "placeholders: they stand in the order timestep, sample;",
            ),
            "an input is declared that is not there": (
                spoiled(declare_one_more),
                "inputs: guidance is new;",
            ),
        },
    ),
)
"""Bugs that no address is the place of: `at` is what the refusal says."""
