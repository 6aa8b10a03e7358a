"""Attention by the native kernels: in codes, equal to `runtime.attention` bit for bit, and in real numbers."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dmqfx.runtime.attention import check, qattention
from dmqfx.runtime.kernels.native import Attention, library, readable, tell_plain

__all__ = ["WIDEST", "attend", "average"]

WIDEST = 1024
"""Channels of a head up to which scores of codes fit the 24 bits that the plain-torch reference has for them."""

MANY = 512
"""Keys up to which scores in real numbers stay in the second cache."""

FAR = 1e30
"""A scale as large could be infinite in float32, and no number times a difference of 0."""


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
    if not _fits(query, key, value):
        if query.numel() and key.numel():
            wide = (
                f"{query.shape[3]} channels a head, its kernel takes {WIDEST}"
                if query.shape[3] > WIDEST
                else ""
            )
            tell_plain("kernel_attention", query, key, value, wide=wide)
        return qattention(query, key, value, scale, bits)
    return _attended(query, key, value, factor, bits, instruction_set)


def average(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None = None, instruction_set: str | None = None
) -> Tensor:
    """softmax(query * scale @ key^T) @ value in real numbers, by the native kernel for float32 on the CPU.

    Over more than `MANY` keys, where torch's kernel is faster, it is left to that, and so are other shapes, scales, dtypes
    and devices.

    Shapes: as attend; returns [B, heads, T, E], in memory as [B, T, heads, E] where it has four dimensions.
    Raises: DmqfxError for an instruction set that is not there, or no memory.
    """
    alike = query.dim() == key.dim() == 4 and query.shape[:2] == key.shape[:2] and key.shape == value.shape
    if alike and query.shape[3] == key.shape[3] and key.shape[2] <= MANY and _fits(query, key, value):
        factor = 1 / math.sqrt(query.shape[3]) if scale is None else scale
        if 0 <= factor < FAR:
            return _attended(query, key, value, factor, 0, instruction_set)
    made = scaled_dot_product_attention(query, key, value, scale=scale)
    return made.transpose(1, 2).contiguous().transpose(1, 2) if made.dim() == 4 else made


def _fits(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the kernel can read these."""
    empty = query.numel() == 0 or key.numel() == 0
    readable_all = all(map(readable, (query, key, value)))
    return library() is not None and not empty and readable_all and query.shape[3] <= WIDEST


def _attended(
    query: Tensor, key: Tensor, value: Tensor, factor: float, bits: int, instruction_set: str | None
) -> Tensor:
    native, (batch, heads, queries, width) = library(), query.shape
    assert native is not None
    found = Attention(batch, heads, queries, key.shape[2], width, bits, factor)
    kept = [each if each.stride(3) == 1 else each.contiguous() for each in (query, key, value)]
    out = query.new_empty((batch, queries, heads, width)).transpose(1, 2)
    for name, each in zip("qkv", kept, strict=True):
        setattr(found, name, each.data_ptr())
        getattr(found, f"of_{name}")[:] = each.stride()[:3]
    found.out, found.of_out[:] = out.data_ptr(), out.stride()[:3]
    native.attend(found, instruction_set)
    return out
