"""canonicalize: drop what does nothing at evaluation time, so that every later rule needs one pattern."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from dmqfx.graph import ops
from dmqfx.graph.facts import CANONICAL, Fact
from dmqfx.graph.inputs import InputSpec
from dmqfx.graph.modules import call_with, clone, propagate
from dmqfx.graph.pattern import Outcome, Rule, p, rule, sweep
from dmqfx.graph.pipeline import Pass, PassContext, Preserves
from dmqfx.graph.program import Program
from dmqfx.graph.rewrite import Rewriter

CHECKS = (
    "_assert_tensor_metadata",
    "_assert_scalar",
    "_assert_async",
    "sym_constrain_range",
    "sym_constrain_range_for_size",
)
FOLDED_SIZE = 65536


@rule(p.one_of("dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout"))
def drop_dropout(rw: Rewriter, root: fx.Node) -> Outcome:
    """dropout(x, p, train=False)  ->  x."""
    named = ops.args(root)
    x = named["input"]
    return x if isinstance(x, fx.Node) and not named["train"] else None


@rule(p.one_of("div", "mul"))
def drop_unit_factor(rw: Rewriter, root: fx.Node) -> Outcome:
    """x / 1.0, x * 1.0  ->  x, where the dtype stays."""
    named = ops.args(root)
    x, other = named["self"], named["other"]
    one = not isinstance(other, (fx.Node, bool)) and other == 1 and named.get("rounding_mode") is None
    return x if isinstance(x, fx.Node) and one and _dtype(x) == _dtype(root) else None


@rule(p.one_of("to", "_to_copy", "clone", "contiguous", "alias", "detach", "lift_fresh_copy"))
def drop_copy(rw: Rewriter, root: fx.Node) -> Outcome:
    """to, contiguous, clone that change neither dtype, device nor strides  ->  x."""
    x = root.all_input_nodes[0] if len(root.all_input_nodes) == 1 else None
    if (
        x is None
        or not isinstance(old := x.meta["val"], Tensor)
        or not isinstance(new := root.meta["val"], Tensor)
    ):
        return None
    same = (old.dtype, old.device, old.stride()) == (new.dtype, new.device, new.stride())
    return x if same else None


@rule(p.any())
def fold_constant(rw: Rewriter, root: fx.Node) -> Outcome:
    """f(constants)  ->  constant, for what depends on no input (the frequencies of the time embedding)."""
    target = root.target
    if not isinstance(target, OpOverload) or not _foldable(root, target):
        return None
    value = call_with(target, root.args, root.kwargs, rw.value)
    if not isinstance(value, Tensor) or value.numel() > FOLDED_SIZE:
        return None
    address = root.meta["address"]
    return rw.constant(f"{address.path}.{address.op}".lstrip("."), value.to(_device(rw)))


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Drop evaluation-time no-ops, fold constants, spell arguments in schema order."""

    provides: ClassVar[frozenset[Fact]] = frozenset({CANONICAL})
    preserves: ClassVar[Preserves] = Preserves.BITWISE
    rules: ClassVar[tuple[Rule, ...]] = (drop_dropout, drop_unit_factor, drop_copy, fold_constant)

    def run(self, program: Program, ctx: PassContext) -> Program:
        """Sweep until nothing changes; then the spelling of arguments, which changes no meaning."""
        rw = Rewriter(program, self.name(), ctx.journal)
        for node in list(rw.graph.nodes):
            if (
                ops.is_call(node, *CHECKS)
                and not node.users
                and rw.journal.apply(node.meta["address"], "drop_check")
            ):
                rw.graph.erase_node(node)
        idle = _idle_views(program)
        for node in list(rw.graph.nodes):
            if node.meta.get("address") in idle and rw.journal.apply(node.meta["address"], "drop_view"):
                rw.replace(node, node.all_input_nodes[0])
        while sweep(rw, self.rules):
            pass
        for node in rw.graph.nodes:
            rw.respell(node)
        return rw.finish()


def _idle_views(program: Program) -> set[object]:
    """Addresses of reshapes that keep the shape, at the example sizes and at others: not by chance.

    One with a dimension of size 1 may give it another stride, by which convolutions choose their kernel.
    """
    views = {"view", "reshape", "expand", "_unsafe_view", "flatten", "unflatten"}
    there = _same_shape(program.gm, views)
    return there & _same_shape(_elsewhere(program), views) if there else there


def _same_shape(gm: fx.GraphModule, names: set[str]) -> set[object]:
    calls = ((n, n.all_input_nodes[0].meta["val"]) for n in gm.graph.nodes if ops.is_call(n, *names))
    return {n.meta["address"] for n, x in calls if n.meta["val"].shape == x.shape and _is_straight(x)}


def _is_straight(x: Tensor) -> bool:
    """Whether dims of 1 have the strides that a view gives them; a convolution chooses its kernel by those, too."""
    usual = torch.empty(x.shape, device="meta").stride()
    return all(n != 1 or found == wanted for n, found, wanted in zip(x.shape, x.stride(), usual, strict=True))


def _elsewhere(program: Program) -> fx.GraphModule:
    gm = clone(program.gm)
    sizes = program.inputs.sizes
    step = program.inputs.multiple_of
    other = {"B": sizes["B"] + 1, "H": sizes["H"] + 8 * step, "W": sizes["W"] + 16 * step}
    propagate(gm, _resized(program.inputs, {**sizes, **other, "T": sizes.get("T", 1) + 3}))
    return gm


def _resized(inputs: InputSpec, sizes: dict[str, int]) -> InputSpec:
    return replace(inputs, sizes=sizes)


def _foldable(node: fx.Node, target: OpOverload) -> bool:
    if (
        torch.Tag.nondeterministic_seeded in target.tags
        or target._schema.is_mutable
        or target.namespace != "aten"
    ):
        return False
    read = node.all_input_nodes
    return all(n.op == "get_attr" and n.meta["val"].numel() <= FOLDED_SIZE for n in read) and isinstance(
        node.meta["val"], Tensor
    )


def _device(rw: Rewriter) -> torch.device:
    first = next((n for n in rw.graph.nodes if n.op == "get_attr"), None)
    return rw.value(first).device if first is not None else torch.device("cpu")


def _dtype(node: fx.Node) -> torch.dtype | None:
    value = node.meta["val"]
    return value.dtype if isinstance(value, Tensor) else None
