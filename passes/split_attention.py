"""split-attention: attention becomes its two products, with the softmax between them a tensor of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from dmqfx.graph import ops
from dmqfx.graph.facts import CANONICAL, QDQ, Fact
from dmqfx.graph.pattern import Outcome, RewritePass, Rule, p, rule
from dmqfx.graph.pipeline import Preserves
from dmqfx.graph.rewrite import Refuse, Rewriter
from dmqfx.graph.table import Table
from dmqfx.runtime.operators import OPS


@rule(p.scaled_dot_product_attention(query=p.any("query"), key=p.any("key"), value=p.any("value")))
def split(rw: Rewriter, root: fx.Node, query: fx.Node, key: fx.Node, value: fx.Node) -> Outcome:
    """attention(q, k, v)  ->  average(softmax(q * scale @ k^T + mask), v)."""
    if (reason := _unfit(root, rw.table)) is not None:
        return Refuse(reason)
    named = ops.args(root)
    softmax = rw.call(
        OPS.attention_softmax.default, near=root, query=query, key=key, attn_mask=named["attn_mask"],
        scale=named["scale"],
    )  # fmt: skip
    return rw.call(OPS.attention_average.default, near=root, softmax=softmax, value=value)


@dataclass(frozen=True)
class SplitAttention(RewritePass):
    """attention(q, k, v)  ->  average(softmax(q * scale @ k^T + mask), v), so that a policy can quantize the softmax.

    The operands keep their names and shapes; the softmax [B, heads, T, S] is one more. It is computed whole: torch's
    own operator never holds all of it, and is faster.
    """

    requires: ClassVar[frozenset[Fact]] = frozenset({CANONICAL})
    forbids: ClassVar[frozenset[Fact]] = frozenset({QDQ})
    preserves: ClassVar[Preserves] = Preserves.EXACT
    rules: ClassVar[tuple[Rule, ...]] = (split,)


def _unfit(attention: fx.Node, table: Table) -> str | None:
    """Why attention cannot be split, or None."""
    named = ops.args(attention)
    if any(site.at == attention.meta["address"] for site in table.sites()):
        return "it is planned as a whole already; put split-attention before plan-sites"
    if named["is_causal"]:
        return "it is causal: its mask is not a tensor"
    if named["dropout_p"] != 0:
        return f"it drops {named['dropout_p']:.3g} of the softmax at random"
    if named["enable_gqa"]:
        return "groups of heads share keys"
    dims = ops.tensor(attention, "query").meta["val"].dim()
    return None if dims == 4 else f"its operands have {dims} axes, not batch, heads, tokens and channels"
