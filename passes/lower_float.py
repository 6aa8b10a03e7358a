"""lower-float: attention over few keys and norms that stayed float to native kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from dmqfx.graph import ops
from dmqfx.graph.attention import OPERANDS, more_than_plain
from dmqfx.graph.facts import INTEGER, Fact
from dmqfx.graph.pipeline import Pass, PassContext, Preserves
from dmqfx.graph.program import Program
from dmqfx.graph.rewrite import Rewriter
from dmqfx.runtime.costs import Costs, attention_of, size_of
from dmqfx.runtime.kernels.attend import WIDEST
from dmqfx.runtime.kernels.native import absent
from dmqfx.runtime.operators import OPS

MOST_KEYS = 64
"""Where nothing was measured: up to so many keys the kernel is about as fast as torch's, or faster."""


@dataclass(frozen=True)
class LowerFloat(Pass):
    """attention(q, k, v) over few keys  ->  kernel_sdpa(q, k, v); silu(group_norm(x))  ->  kernel_group_norm_silu(x).

    `dmqfx bench` finds out which attention is faster natively, at the sizes that it was asked for; at others few keys are up
    to 64, at the example sizes. Norms are those that fuse left, as the one before a float convolution at the end, of what
    lies channels last. Sums are rounded in another order than torch's. Both kernels are of float32.
    """

    requires: ClassVar[frozenset[Fact]] = frozenset({INTEGER})
    preserves: ClassVar[Preserves] = Preserves.EXACT

    def run(self, program: Program, ctx: PassContext) -> Program:
        """Another operator for each that is faster so; for each that is not, the reason."""
        costs, rw = Costs.here(), Rewriter(program, self.name(), ctx.journal)
        for node in ctx.journal.fuelled(list(program.calls("scaled_dot_product_attention", "silu"))):
            attends, at = not ops.is_call(node, "silu"), node.meta["address"]
            if not attends and not ops.is_call(ops.tensor(node, "self"), "group_norm"):
                continue
            if reason := absent() or (_slow(node, costs) if attends else _apart(node)):
                ctx.journal.refuse(at, "native", reason)
            elif ctx.journal.apply(at, "native"):
                old = rw.node(at)
                with rw.before(old):
                    rw.replace(old, _attention(rw, old) if attends else _norm(rw, old))
        return rw.finish()


def _attention(rw: Rewriter, old: fx.Node) -> fx.Node:
    named = {arg: ops.args(old)[arg] for arg in (*OPERANDS, "scale")}
    return rw.call_at(OPS.kernel_sdpa.default, old.meta["address"], **named)


def _norm(rw: Rewriter, old: fx.Node) -> fx.Node:
    norm = ops.args(ops.tensor(old, "self"))
    named = {"x": norm["input"]} | {arg: norm[arg] for arg in ("num_groups", "weight", "bias", "eps")}
    return rw.call_at(OPS.kernel_group_norm_silu.default, old.meta["address"], **named)


def _apart(silu: fx.Node) -> str | None:
    """Why the kernel is not for this activation and the norm before it, or None."""
    norm = ops.tensor(silu, "self")
    if len(norm.users) > 1:
        return "its norm has other readers"
    made, read = norm.meta["val"], ops.tensor(norm, "input").meta["val"]
    if made.dim() != 4 or made.dtype != torch.float32:
        return f"the kernel takes images in float32, not {made.dim()} dimensions in {str(made.dtype).removeprefix('torch.')}"
    if not read.is_contiguous(memory_format=torch.channels_last):
        return "what it norms does not lie channels last"
    return None


def _slow(attention: fx.Node, costs: Costs) -> str | None:
    """Why the kernel is not for this attention, or None."""
    if more := more_than_plain(attention):
        return more
    name = attention_of(attention)
    query, key, _ = (ops.tensor(attention, arg).meta["val"] for arg in OPERANDS)
    if name is None:
        words = str(query.dtype).removeprefix("torch.")
        return (
            f"the kernel takes float32 and heads of up to {WIDEST} channels, not {words} of {query.shape[3]}"
        )
    cost = costs.found.get((name, size_of(attention)))
    if cost is not None and cost.native_loses:
        return f"native {cost.native:.3g} ms, by torch {cost.otherwise:.3g} ms (dmqfx bench)"
    if cost is None and key.shape[2] > MOST_KEYS:
        return f"it has {key.shape[2]} keys, more than {MOST_KEYS}: torch's kernel is the faster over many"
    return None
