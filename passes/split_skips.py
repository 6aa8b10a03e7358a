"""split-skips: a convolution of a long skip's concatenation becomes one convolution for each arm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx
from torch._ops import OpOverload

from dmqfx.graph import ops
from dmqfx.graph.address import Address, Site
from dmqfx.graph.facts import CANONICAL, FLAGGED, QDQ, Fact
from dmqfx.graph.modules import is_fixed, label
from dmqfx.graph.pipeline import Pass, PassContext, Preserves
from dmqfx.graph.program import Program
from dmqfx.graph.rewrite import Refuse, Rewriter
from dmqfx.graph.sites import readers
from dmqfx.graph.table import SkipArm, SkipConcat, Table


@dataclass(frozen=True)
class SplitSkips(Pass):
    """conv(cat(deep, skip), W, b)  ->  conv(deep, W[:, :D], b) + conv(skip, W[:, D:]), D the deep channels.

    The arms have nothing in common, and as layers of their own they get ranges, weight scales, equivalent
    scales and shifts of their own, by the same passes as every other layer. The convolution of the first arm
    keeps address and bias. A concatenation that nothing else reads is gone.

    Source: the split shortcut of Q-Diffusion (arXiv 2302.04304), which DMQ uses.
    """

    requires: ClassVar[frozenset[Fact]] = frozenset({CANONICAL, FLAGGED})
    forbids: ClassVar[frozenset[Fact]] = frozenset({QDQ})
    preserves: ClassVar[Preserves] = Preserves.EXACT

    def run(self, program: Program, ctx: PassContext) -> Program:
        """Split the convolutions that read a flagged concatenation directly; record what each arm is."""
        rw = Rewriter(program, self.name(), ctx.journal)
        table = program.table
        for site, skip in program.table.of(SkipConcat).items():
            concat = rw.node(site.at)
            layers = [user for user, arg in readers(concat) if arg == "input" and ops.is_call(user, "conv2d")]
            if not layers:
                others = ", ".join(sorted(label(user) for user in concat.users))
                ctx.journal.refuse(site, "split", f"no convolution reads it directly, only {others}")
            for layer in layers:
                unfit = _unfit(layer, table)
                if unfit is not None:
                    ctx.journal.refuse(layer.meta["address"], "split", unfit.reason)
                elif ctx.journal.apply(layer.meta["address"], "split", f"arms of {site.at}"):
                    table = _split(rw, layer, concat, skip, table)
            if not concat.users:
                table = table.drop(site, SkipConcat)
        return rw.finish().with_table(table)


def _unfit(layer: fx.Node, table: Table) -> Refuse | None:
    """Why a convolution cannot be split, or None."""
    named = ops.args(layer)
    if named["groups"] != 1:
        return Refuse(f"it has {named['groups']} groups, which need not end where the arms do")
    if not is_fixed(named["weight"]):
        return Refuse("its weight depends on an input")
    if any(site.at == layer.meta["address"] for site in table.sites()):
        return Refuse("it is planned as a whole already; put split-skips before plan-sites")
    return None


def _split(rw: Rewriter, layer: fx.Node, concat: fx.Node, skip: SkipConcat, table: Table) -> Table:
    """Put the sum in the place of the convolution; the table with what each new input is."""
    arms = ops.args(concat)["tensors"]
    assert isinstance(arms, (list, tuple))  # flag-skips looked
    first, second = arms
    named, weight = ops.args(layer), rw.value(ops.tensor(layer, "weight"))
    count = skip.deep if skip.skip_last else skip.skip
    left, right = weight[:, :count].contiguous(), weight[:, count:].contiguous()
    with rw.before(layer):
        one = rw.like(layer, input=first, weight=left)
        rest = {key: named[key] for key in ("stride", "padding", "dilation")}
        assert isinstance(layer.target, OpOverload)  # ops.is_call found it
        two = rw.call(layer.target, near=layer, input=second, weight=right, **rest)
        rw.replace(layer, rw.call(torch.ops.aten.add.Tensor, near=layer, self=one, other=two))
    deep, other = (one, two) if skip.skip_last else (two, one)
    at: Address = concat.meta["address"]
    table = table.put(Site(deep.meta["address"], "input"), SkipArm("deep", at, skip.uneven))
    return table.put(Site(other.meta["address"], "input"), SkipArm("skip", at, skip.uneven))
