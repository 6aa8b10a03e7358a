"""split-concat, a pass of another package: each arm of a concatenation gets a convolution of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from dmqfx import Fact, Pass, PassContext, Preserves, Program, Refuse, Rewriter
from dmqfx.graph import ops
from dmqfx.graph.facts import CANONICAL

conv2d, add = torch.ops.aten.conv2d.default, torch.ops.aten.add.Tensor


@dataclass(frozen=True)
class SplitConcat(Pass):
    """conv2d(cat(a, b), w)  ->  conv2d(a, wa) + conv2d(b, wb), where each arm has `least` channels."""

    requires: ClassVar[frozenset[Fact]] = frozenset({CANONICAL})
    preserves: ClassVar[Preserves] = Preserves.EXACT
    least: int = 1

    def run(self, program: Program, ctx: PassContext) -> Program:
        """Split every convolution that reads a concatenation of two."""
        rw = Rewriter(program, self.name(), ctx.journal)
        for conv in [node for node in rw.graph.nodes if ops.is_call(node, "conv2d")]:
            arms = self._arms(conv)
            if isinstance(arms, Refuse):
                ctx.journal.refuse(conv.meta["address"], "split", arms.reason)
            elif arms and ctx.journal.apply(conv.meta["address"], "split"):
                with rw.before(conv):
                    rw.replace(conv, _split(rw, conv, *arms))
        return rw.finish()

    def _arms(self, conv: fx.Node) -> tuple[fx.Node, fx.Node] | Refuse | None:
        """The two values that a convolution reads together; None if it reads no concatenation."""
        x = ops.tensor(conv, "input")
        if not ops.is_call(x, "cat"):
            return None
        arms = ops.args(x)["tensors"]
        if len(arms) != 2 or ops.args(conv)["groups"] != 1:
            return Refuse(f"{len(arms)} arms in {ops.args(conv)['groups']} groups; 2 in 1 can be split", conv)
        least = min(arm.meta["val"].shape[1] for arm in arms)
        if least < self.least:
            return Refuse(f"an arm has {least} channels, fewer than {self.least}", conv)
        return tuple(arms)


def _split(rw: Rewriter, conv: fx.Node, a: fx.Node, b: fx.Node) -> fx.Node:
    same, k = ops.args(conv), a.meta["val"].shape[1]
    weight = rw.value(ops.tensor(conv, "weight"))
    left = rw.call(conv2d, near=conv, **{**same, "input": a, "weight": weight[:, :k]})
    right = rw.call(conv2d, near=conv, **{**same, "input": b, "weight": weight[:, k:], "bias": None})
    return rw.call(add, near=conv, self=left, other=right)
