"""Attention in two products, with the softmax between them as a tensor of its own."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["attention_average", "attention_softmax"]


def attention_softmax(
    query: Tensor, key: Tensor, attn_mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """softmax(query * scale @ key^T + mask) over the keys; rows in which the mask leaves no key are zero.

    Shapes: query [B, heads, T, E], key [B, heads, S, E]; attn_mask broadcasts to the result, is added where it is
        float, and keeps what is true where it is boolean; returns [B, heads, T, S].
    Units: scale is 1 / sqrt(E) if it is None.
    """
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = (query * factor) @ key.transpose(-2, -1)
    if attn_mask is None:
        return scores.softmax(-1)
    kept = attn_mask.dtype == torch.bool
    masked = scores.masked_fill(~attn_mask, -math.inf) if kept else scores + attn_mask
    found: Tensor = torch.ops.aten._safe_softmax.default(masked, -1)
    return found


def attention_average(softmax: Tensor, value: Tensor) -> Tensor:
    """The averages of the values that the softmax weighs.

    Shapes: softmax [B, heads, T, S], value [B, heads, S, E]; returns [B, heads, T, E].
    """
    return softmax @ value
