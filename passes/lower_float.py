"""lower-float: attention that stayed float, over few keys, to a native kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from dmqfx.graph import ops
from dmqfx.graph.attention import OPERANDS, more_than_plain
from dmqfx.graph.facts import INTEGER, Fact
from dmqfx.graph.pipeline import Pass, PassContext, Preserves
from dmqfx.graph.program import Program
from dmqfx.graph.rewrite import Rewriter
from dmqfx.runtime.costs import Costs, attention_of, size_of
from dmqfx.runtime.kernels.native import absent
from dmqfx.runtime.operators import OPS

MOST_KEYS = 64


@dataclass(frozen=True)
class LowerFloat(Pass):
    """scaled_dot_product_attention(q, k, v) in float32  ->  kernel_sdpa(q, k, v), where that is faster.

    It is over few keys: to call torch's takes longer than to compute. `dmqfx bench` finds out for a model's shapes; where it
    was not asked, few keys are up to 64 at the example sizes. Sums are rounded in another order than torch's.
    """

    requires: ClassVar[frozenset[Fact]] = frozenset({INTEGER})
    preserves: ClassVar[Preserves] = Preserves.EXACT

    def run(self, program: Program, ctx: PassContext) -> Program:
        """Another operator for each that is faster so; for each that is not, the reason."""
        costs, rw = Costs.here(), Rewriter(program, self.name(), ctx.journal)
        for node in ctx.journal.fuelled(list(program.calls("scaled_dot_product_attention"))):
            at = node.meta["address"]
            if reason := absent() or _slow(node, costs):
                ctx.journal.refuse(at, "native", reason)
            elif ctx.journal.apply(at, "native"):
                old = rw.node(at)
                named = {arg: ops.args(old)[arg] for arg in (*OPERANDS, "scale")}
                with rw.before(old):
                    rw.replace(old, rw.call_at(OPS.kernel_sdpa.default, at, **named))
        return rw.finish()


def _slow(attention: fx.Node, costs: Costs) -> str | None:
    """Why the kernel is not for this attention, or None."""
    if more := more_than_plain(attention):
        return more
    name = attention_of(attention)
    query, key, _ = (ops.tensor(attention, arg).meta["val"] for arg in OPERANDS)
    if name is None:
        words = str(query.dtype).removeprefix("torch.")
        return f"the kernel takes float32 and heads of up to 1024 channels, not {words} of {query.shape[3]}"
    cost = costs.of(name, size_of(attention))
    if cost is not None and cost.simulated_is_faster:
        return f"native {cost.native:.3g} ms, by torch {cost.simulated:.3g} ms (dmqfx bench)"
    if cost is None and key.shape[2] > MOST_KEYS:
        return (
            f"it has {key.shape[2]} keys, more than the {MOST_KEYS} up to which torch's own kernel is slower"
        )
    return None
