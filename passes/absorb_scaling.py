"""absorb-scaling: fold 1 / gamma into what makes x, where that is exact; the rest joins the quantize step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, fx

from dmqfx.graph import ops
from dmqfx.graph.channelwise import Absorber, absorber, divisor
from dmqfx.graph.facts import MEASURED, QDQ, ROUNDED, SCALED, Fact
from dmqfx.graph.pattern import Outcome, RewritePass, Rule, p, rule
from dmqfx.graph.pipeline import Preserves
from dmqfx.graph.rewrite import Refuse, Rewriter


@rule(p.div())
def absorb(rw: Rewriter, root: fx.Node) -> Outcome:
    """layer(x, w, b) / gamma  ->  layer(x, w / gamma, b / gamma), through reshapes, heads and products.

    Group norm and layer norm take it in their gain and bias, linear layers and convolutions (to_v before
    to_out, the linear half of GEGLU before the output projection) in their rows.
    """
    if (division := divisor(root)) is None:
        return None
    x, gamma, axis = division
    if len(x.users) > 1:
        return Refuse(f"{x.meta.get('address', x.target)} has other readers, which expect it unscaled", x)
    found = absorber(x, axis, rw.table)
    if isinstance(found, Refuse):
        return found
    _fold(rw, found, 1 / rw.value(gamma).flatten())
    return x if found.node is not x else rw.node(x.meta["address"])


def _fold(rw: Rewriter, found: Absorber, factor: Tensor) -> None:
    """The producer with its rows times the factor; what stands between reads on as before."""
    node = found.node
    rows = found.spread(factor)
    named = ops.args(node)
    changed: dict[str, Tensor] = {}
    for arg in ("weight", "bias"):
        value = named.get(arg)
        if isinstance(value, fx.Node):
            tensor = rw.value(value)
            changed[arg] = tensor * rows.view(-1, *[1] * (tensor.dim() - 1)).to(tensor.dtype)
    with rw.before(node):
        rw.replace(node, rw.like(node, **changed))


@dataclass(frozen=True)
class AbsorbScaling(RewritePass):
    """x / gamma  ->  x, with 1 / gamma in the rows of what makes x.

    What the UNet's output feels of those rows is another thing afterwards, so it is measured behind this pass.
    """

    requires: ClassVar[frozenset[Fact]] = frozenset({SCALED})
    clears: ClassVar[frozenset[Fact]] = frozenset({ROUNDED})
    forbids: ClassVar[frozenset[Fact]] = frozenset({QDQ, MEASURED})
    preserves: ClassVar[Preserves] = Preserves.EXACT
    rules: ClassVar[tuple[Rule, ...]] = (absorb,)
