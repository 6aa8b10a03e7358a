"""lower-simulate: the QDQ program in float, its weights dequantized once and not at every call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from dmqfx.graph import ops
from dmqfx.graph.facts import INTEGER, QDQ, Fact
from dmqfx.graph.pattern import Outcome, RewritePass, Rule, p, rule
from dmqfx.graph.pipeline import Preserves
from dmqfx.graph.rewrite import Rewriter
from dmqfx.runtime.operators import OPS


@rule(
    p.dequantize(
        codes=p.unpack(packed=p.attr("packed")).as_("unpacked"),
        scale=p.attr("scale"),
        zero_point=p.attr("zero_point"),
    )
)
def fold_weight(
    rw: Rewriter, root: fx.Node, unpacked: fx.Node, packed: fx.Node, scale: fx.Node, zero_point: fx.Node
) -> Outcome:
    """dequantize(unpack(packed))  ->  the float weight that it computes."""
    named, axis = ops.args(unpacked), ops.args(root)["axis"]
    codes = OPS.unpack(rw.value(packed), named["bits"], named["signed"], named["shape"])
    real = OPS.dequantize(codes, rw.value(scale), rw.value(zero_point), None, axis)
    return rw.constant(str(packed.target).removesuffix("_packed") + "_simulated", real)


@dataclass(frozen=True)
class LowerSimulate(RewritePass):
    """dequantize(unpack(packed))  ->  float weight; activations stay quantize-dequantize pairs."""

    requires: ClassVar[frozenset[Fact]] = frozenset({QDQ})
    provides: ClassVar[frozenset[Fact]] = frozenset({INTEGER})
    clears: ClassVar[frozenset[Fact]] = frozenset({QDQ})
    preserves: ClassVar[Preserves] = Preserves.BITWISE
    rules: ClassVar[tuple[Rule, ...]] = (fold_weight,)
