"""choose-forms: layers that are faster simulated than native on this machine, as `dmqfx bench` measured, stay simulated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from dmqfx.graph import ops
from dmqfx.graph.facts import QDQ, Fact
from dmqfx.graph.journal import Journal
from dmqfx.graph.pipeline import Pass, PassContext, Preserves
from dmqfx.graph.program import Program
from dmqfx.graph.rewrite import Rewriter
from dmqfx.passes.lower_simulate import fold_weight
from dmqfx.runtime.costs import LEAVE_FLOAT, Cost, Costs, attention_of, layer_of, size_of


@dataclass(frozen=True)
class ChooseForms(Pass):
    """layer(dequantize(x), dequantize(unpack(w)))  ->  layer(dequantize(x), float w), where that is faster than a kernel.

    No integer layer is made of it then; its weight is in memory in float. Layers that read one quantize stay together: its
    codes are for all of them or for none. What was measured is kept for each machine and number of threads; where
    nothing was, every layer is native. Attention in codes stays, since float attention is another result: where it is
    slower than that, the record says so and how to compile the model without.
    """

    requires: ClassVar[frozenset[Fact]] = frozenset({QDQ})
    preserves: ClassVar[Preserves] = Preserves.BITWISE

    def run(self, program: Program, ctx: PassContext) -> Program:
        """Fold the weights of the slow ones, and say how many there are."""
        costs, rw = Costs.here(), Rewriter(program, self.name(), ctx.journal)
        known = {
            node: costs.of(name, size_of(node))
            for node in rw.graph.nodes
            if node.op == "call_function" and (name := layer_of(node)) is not None
        }
        slow = list(_slow(known))
        folded = sum(_fold(rw, node, cost) for node, cost in ctx.journal.fuelled(slow))
        unknown = sum(cost is None for cost in known.values())
        told = f"{folded} of {len(known)} layers stay simulated"
        ctx.journal.note = told + f", {unknown} were not measured here (dmqfx bench)" * bool(unknown)
        _refuse_attention(program, ctx.journal, costs)
        return rw.finish()


def _slow(known: dict[fx.Node, Cost | None]) -> Iterator[tuple[fx.Node, Cost]]:
    """Layers whose group, all that read one quantize, is faster simulated."""
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in known:
        groups.setdefault(ops.tensor(ops.tensor(node, "input"), "codes"), []).append(node)
    for nodes in groups.values():
        costs = [cost for node in nodes if (cost := known[node]) is not None]
        whole = Cost(sum(c.native for c in costs), sum(c.otherwise for c in costs))
        if len(costs) == len(nodes) and whole.native_loses:
            yield from zip(nodes, costs, strict=True)


def _refuse_attention(program: Program, journal: Journal, costs: Costs) -> None:
    """Attention in codes that is slower than in float."""
    for node in program.calls("qattention"):
        cost = costs.found.get((str(attention_of(node)), size_of(node)))
        if cost is not None and cost.native_loses:
            reason = f"in codes {cost.native:.3g} ms, in float {cost.otherwise:.3g} ms, which would be another result; "
            journal.refuse(node.meta["address"], "float", reason + LEAVE_FLOAT)


def _fold(rw: Rewriter, layer: fx.Node, cost: Cost) -> bool:
    """Whether the layer reads a float weight now."""
    weight, at = ops.tensor(layer, "weight"), layer.meta["address"]
    new = fold_weight.try_at(rw, weight) if len(weight.users) == 1 else None
    if not isinstance(new, fx.Node):
        rw.journal.refuse(at, "simulate", "its weight is not unpacked for it alone")
        return False
    told = f"native {cost.native:.3g} ms, simulated {cost.otherwise:.3g} ms"
    if not rw.journal.apply(at, "simulate", told):
        return False
    rw.replace(weight, new)
    return True
