"""choose-forms: layers that are faster simulated than native on this machine, as `dmqfx bench` measured, stay simulated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from dmqfx.graph import ops
from dmqfx.graph.facts import QDQ, Fact
from dmqfx.graph.pipeline import Pass, PassContext, Preserves
from dmqfx.graph.program import Program
from dmqfx.graph.rewrite import Rewriter
from dmqfx.passes.lower_simulate import fold_weight
from dmqfx.runtime.costs import Cost, Costs, layer_of


@dataclass(frozen=True)
class ChooseForms(Pass):
    """layer(dequantize(x), dequantize(unpack(w)))  ->  layer(dequantize(x), float w), where that is faster than a kernel.

    No integer layer is made of it then; its weight is in memory in float. What was measured is kept for each machine and
    number of threads; where nothing was, every layer is native.
    """

    requires: ClassVar[frozenset[Fact]] = frozenset({QDQ})
    preserves: ClassVar[Preserves] = Preserves.BITWISE

    def run(self, program: Program, ctx: PassContext) -> Program:
        """Fold the weights of the slow ones, and say how many there are."""
        costs, rw = Costs.here(), Rewriter(program, self.name(), ctx.journal)
        known = {node: layer_of(node) for node in rw.graph.nodes}
        found = {node: costs.of(name) for node, name in known.items() if name is not None}
        slow = {node: cost for node, cost in found.items() if cost is not None and cost.simulated_is_faster}
        folded = 0
        for node in ctx.journal.fuelled(list(slow)):
            folded += _fold(rw, node, slow[node])
        unknown = sum(cost is None for cost in found.values())
        told = f"{folded} of {len(found)} layers stay simulated"
        ctx.journal.note = told + f", {unknown} were not measured here (dmqfx bench)" * bool(unknown)
        return rw.finish()


def _fold(rw: Rewriter, layer: fx.Node, cost: Cost) -> bool:
    """The layer reads a float weight, if there is fuel left."""
    weight, at = ops.tensor(layer, "weight"), layer.meta["address"]
    told = f"native {cost.native:.3g} ms, simulated {cost.simulated:.3g} ms"
    if len(weight.users) > 1 or not rw.journal.apply(at, "simulate", told):
        return False
    new = fold_weight.try_at(rw, weight)
    if not isinstance(new, fx.Node):
        rw.journal.refuse(at, "simulate", "its weight cannot be dequantized once")
        return False
    rw.replace(weight, new)
    return True
