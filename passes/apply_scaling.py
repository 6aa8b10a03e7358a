"""apply-scaling: y = layer(x, W)  ->  y = layer(x / gamma, W * gamma)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from dmqfx.graph import ops
from dmqfx.graph.facts import LEARNED, QDQ, SCALED, Fact
from dmqfx.graph.pipeline import Pass, PassContext, Preserves
from dmqfx.graph.program import Program
from dmqfx.graph.rewrite import Rewriter
from dmqfx.graph.sites import channel_axis
from dmqfx.graph.table import ChannelScale, LayerPair, Range
from dmqfx.numbers.scaling import column_factor


@dataclass(frozen=True)
class ApplyScaling(Pass):
    """Divide what a pair's readers read by gamma and multiply it into their weights; ranges follow.

    W * gamma stays an expression of two constants, so that a second copy of every weight is never made.
    """

    requires: ClassVar[frozenset[Fact]] = frozenset({LEARNED})
    provides: ClassVar[frozenset[Fact]] = frozenset({SCALED})
    clears: ClassVar[frozenset[Fact]] = frozenset({LEARNED})
    forbids: ClassVar[frozenset[Fact]] = frozenset({QDQ})
    preserves: ClassVar[Preserves] = Preserves.EXACT

    def run(self, program: Program, ctx: PassContext) -> Program:
        """One division per pair, shared by its readers."""
        rw = Rewriter(program, self.name(), ctx.journal)
        table = program.table
        for site, scale in program.table.of(ChannelScale).items():
            pair = table.get(site, LayerPair)
            if pair is None or not ctx.journal.apply(site, "scale", f"read by {len(pair.readers)}"):
                continue
            _divide(rw, pair, scale.gamma, channel_axis(program, site))
            for reader in pair.readers:
                node = rw.node(reader.at)
                weight = ops.tensor(node, "weight")
                factor = column_factor(weight.meta["val"].shape, scale.gamma)
                with rw.before(node):
                    scaled = rw.call(torch.ops.aten.mul.Tensor, near=node, self=weight, other=factor)
                    rw.replace(node, rw.like(node, weight=scaled))
                seen = table.get(reader, Range)
                table = table if seen is None else table.put(reader, _divided(seen, scale.gamma))
        return rw.finish().with_table(table)


def _divide(rw: Rewriter, pair: LayerPair, gamma: Tensor, axis: int) -> None:
    readers = [rw.node(reader.at) for reader in pair.readers]
    first = min(readers, key=list(rw.graph.nodes).index)
    x = ops.tensor(first, "input")
    shape = [-1, 1, 1] if axis == 1 else [-1]
    with rw.before(first):
        divided = rw.call(torch.ops.aten.div.Tensor, near=first, self=x, other=gamma.view(shape))
    for reader in readers:
        rw.redirect(reader, x, divided)


def _divided(seen: Range, gamma: Tensor) -> Range:
    g = gamma.to(seen.low)
    return replace(
        seen, low=seen.low / g, high=seen.high / g, mean=seen.mean / g, variance=seen.variance / g.square()
    )
