"""lower-float: attention over few keys that stayed float, to a native kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from dmqfx.graph import ops
from dmqfx.graph.facts import INTEGER, Fact
from dmqfx.graph.pattern import Outcome, RewritePass, Rule, p, rule
from dmqfx.graph.pipeline import Preserves
from dmqfx.graph.rewrite import Refuse, Rewriter
from dmqfx.runtime.kernels.attend import WIDEST
from dmqfx.runtime.kernels.native import absent
from dmqfx.runtime.operators import OPS

OPERANDS = ("query", "key", "value")
PLAIN = {"attn_mask": None, "is_causal": False, "dropout_p": 0.0, "enable_gqa": False}
MOST_KEYS = 64
"""Up to so many the kernel is no slower than torch's; see benchmarks/bench_attention.py."""


@rule(p.scaled_dot_product_attention())
def attention_over_few_keys(rw: Rewriter, root: fx.Node) -> Outcome:
    """scaled_dot_product_attention(q, k, v)  ->  kernel_sdpa(q, k, v)."""
    if why := absent() or _unfit(root):
        return Refuse(why, root)
    named = {arg: ops.args(root)[arg] for arg in (*OPERANDS, "scale")}
    return rw.call_at(OPS.kernel_sdpa.default, root.meta["address"], **named)


@dataclass(frozen=True)
class LowerFloat(RewritePass):
    """attention over few keys, which stayed float  ->  a native kernel: to call torch's takes longer than to compute.

    Sums are rounded in another order than torch's. Attention with a mask stays as it is, and so does one over more keys than
    64 at the example sizes.
    """

    requires: ClassVar[frozenset[Fact]] = frozenset({INTEGER})
    preserves: ClassVar[Preserves] = Preserves.EXACT
    rules: ClassVar[tuple[Rule, ...]] = (attention_over_few_keys,)


def _unfit(attention: fx.Node) -> str | None:
    """Why the kernel is not for this attention, or None."""
    named = ops.args(attention)
    query, key, value = (ops.tensor(attention, arg).meta["val"] for arg in OPERANDS)
    if other := [arg for arg, usual in PLAIN.items() if named[arg] != usual]:
        return f"it has {other[0]}"
    alike = query.dim() == 4 and query.shape[:2] == key.shape[:2] and key.shape == value.shape
    if not alike or query.shape[3] != key.shape[3]:
        return "its operands are not [batch, heads, tokens, channels], alike but for the tokens of queries"
    if query.shape[3] > WIDEST:
        return f"its heads have {query.shape[3]} channels, more than {WIDEST}"
    dtypes = {str(each.dtype).removeprefix("torch.") for each in (query, key, value)}
    if dtypes != {"float32"}:
        return f"its operands are {' and '.join(sorted(dtypes))}, the kernel takes float32"
    if isinstance(named["scale"], (int, float)) and not named["scale"] >= 0:
        return f"its scale {named['scale']:g} is below 0"
    if key.shape[2] > MOST_KEYS:
        return f"torch's own kernel is as fast over {key.shape[2]} keys, more than {MOST_KEYS}"
    return None
