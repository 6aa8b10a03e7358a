"""What a call of scaled_dot_product_attention is beside softmax(q k^T * scale) v."""

from __future__ import annotations

from torch import fx

from dmqfx.graph import ops
from dmqfx.graph.modules import label

__all__ = ["OPERANDS", "more_than_plain"]

OPERANDS = ("query", "key", "value")


def more_than_plain(attention: fx.Node) -> str | None:
    """What it has that no kernel of ours takes, or None: it is softmax(query * scale @ key^T) @ value and no more.

    Shapes: then query is [B, heads, T, E], key and value [B, heads, S, E].
    """
    named = ops.args(attention)
    if named["attn_mask"] is not None:
        return f"it has a mask, {label(ops.tensor(attention, 'attn_mask'))}"
    if named["is_causal"]:
        return "it is causal"
    if named["dropout_p"] != 0:
        return f"it drops {named['dropout_p']:.3g} of the softmax at random"
    if named["enable_gqa"]:
        return "groups of heads share keys"
    if isinstance(named["scale"], (int, float)) and not named["scale"] >= 0:
        return f"its scale {named['scale']:g} is below 0"
    query, key, value = (ops.tensor(attention, arg).meta["val"].shape for arg in OPERANDS)
    same = len(query) == len(key) == 4 and query[:2] == key[:2] and query[3] == key[3] and key == value
    return (
        None
        if same
        else "its operands are not [batch, heads, tokens, channels], alike but for the tokens of queries"
    )
