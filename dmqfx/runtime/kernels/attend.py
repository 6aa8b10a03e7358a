"""Attention in codes by the native kernels; equal to `runtime.attention` bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor

from dmqfx.runtime.attention import default_scale, qattention
from dmqfx.runtime.kernels.native import Attention, library

__all__ = ["attend"]

WIDEST = 1024
"""Channels of a head that scores are exact for, in 24 bits of the plain-torch reference."""


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None = None,
    bits: int = 8,
    instruction_set: str | None = None,
) -> Tensor:
    """runtime.attention.qattention, by the native kernel for float32 on the CPU.

    Shapes: query [B, heads, T, E], key and value [B, heads, S, E], laid out in any way; returns [B, heads, T, E], in memory
        as [B, T, heads, E].
    Raises: as qattention.
    """
    native, operands = library(), (query, key, value)
    wide = query.dim() == 4 and query.shape[-1] <= WIDEST and key.shape == value.shape and key.shape[-2] > 0
    if native is None or not wide or any(not _readable(each) for each in operands):
        return qattention(query, key, value, scale, bits)
    batch, heads, queries, width = query.shape
    if (key.shape[0], key.shape[1], key.shape[3]) != (batch, heads, width) or not 2 <= bits <= 8:
        return qattention(query, key, value, scale, bits)  # which says what is wrong
    found = Attention(batch, heads, queries, key.shape[2], width, bits, default_scale(query, scale))
    kept = [each if each.stride(3) == 1 else each.contiguous() for each in operands]
    out = torch.empty((batch, queries, heads, width)).transpose(1, 2)
    for name, each in zip("qkv", kept, strict=True):
        setattr(found, name, each.data_ptr())
        getattr(found, f"of_{name}")[:] = each.stride()[:3]
    found.out, found.of_out[:] = out.data_ptr(), out.stride()[:3]
    native.attend(found, instruction_set)
    return out


def _readable(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32
