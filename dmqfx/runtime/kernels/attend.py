"""Attention in codes by the native kernels; equal to `runtime.attention` bit for bit."""

from __future__ import annotations

from torch import Tensor

from dmqfx.runtime.attention import check, qattention
from dmqfx.runtime.kernels.native import Attention, library, readable

__all__ = ["WIDEST", "attend"]

WIDEST = 1024
"""Channels of a head up to which scores fit the 24 bits that the plain-torch reference has for them."""


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None = None,
    bits: int = 8,
    instruction_set: str | None = None,
) -> Tensor:
    """runtime.attention.qattention, by the native kernel for float32 on the CPU and heads of up to `WIDEST` channels.

    Shapes: query [B, heads, T, E], key and value [B, heads, S, E], laid out in any way; returns [B, heads, T, E], in memory
        as [B, T, heads, E].
    Raises: as qattention; DmqfxError for an instruction set that is not there, or no memory.
    """
    factor = check(query, key, value, scale, bits)
    native, operands = library(), (query, key, value)
    batch, heads, queries, width = query.shape
    empty = query.numel() == 0 or key.numel() == 0
    if native is None or empty or width > WIDEST or any(not readable(each) for each in operands):
        return qattention(query, key, value, scale, bits)
    found = Attention(batch, heads, queries, key.shape[2], width, bits, factor)
    kept = [each if each.stride(3) == 1 else each.contiguous() for each in operands]
    out = query.new_empty((batch, queries, heads, width)).transpose(1, 2)
    for name, each in zip("qkv", kept, strict=True):
        setattr(found, name, each.data_ptr())
        getattr(found, f"of_{name}")[:] = each.stride()[:3]
    found.out, found.of_out[:] = out.data_ptr(), out.stride()[:3]
    native.attend(found, instruction_set)
    return out
