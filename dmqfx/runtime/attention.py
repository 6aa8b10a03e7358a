"""Attention in two products, with the softmax between them as a tensor of its own; and attention in codes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["attention_average", "attention_softmax", "check", "qattention"]

TOGETHER = 256
"""Keys whose codes are relative to the greatest score among them."""

STEPS = 32
"""Steps of a power of two that a softmax has."""

TINY = 1e-30
"""What is smaller counts as 0: one over it could be infinite."""


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


def check(query: Tensor, key: Tensor, value: Tensor, scale: float | None, bits: int) -> float:
    """What scores are multiplied by: 1 / sqrt(E) if the scale is None.

    Raises: ValueError for what qattention does not take.
    """
    fits = query.dim() == 4 and query.shape[:2] == key.shape[:2] and query.shape[3] == key.shape[-1] > 0
    if not fits or key.shape != value.shape:
        shapes = ", ".join(str(list(each.shape)) for each in (query, key, value))
        raise ValueError(f"attention of {shapes}: need [B, heads, T, E] and twice [B, heads, S, E]")
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    if not 2 <= bits <= 8 or not factor >= 0:
        raise ValueError(
            f"attention in codes of {bits} bits with scale {factor:g}: need 2 to 8, and none below 0"
        )
    return factor


def qattention(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None = None, bits: int = 8
) -> Tensor:
    """softmax(query * scale @ key^T) @ value in codes, whose scales are found at run time; in plain torch.

    Keys are coded less the middle of each channel, which changes no softmax, and divided by a power of two near the root
    of half its range, by which queries are multiplied: so both keep channels of unlike size. Keys have one scale for each
    head, queries for each row, values for each channel, and the softmax for each row and `TOGETHER` keys. Products are
    sums of integers; the softmax is one of powers of two, in steps of 1 / `STEPS`.

    Source: centred keys and a scale for each row, SageAttention (arXiv 2410.02367); the running maximum, Milakov and
    Gimelshein (arXiv 1805.02867); powers of two, Softermax (arXiv 2103.09301).

    Shapes: query [B, heads, T, E], key and value [B, heads, S, E]; returns [B, heads, T, E], in memory as [B, T, heads, E].
    Units: codes of queries and of the softmax have `bits`, 2..8, those of keys and values 8.
    Raises: ValueError for other shapes or bits, or a negative scale.
    """
    factor = check(query, key, value, scale, bits)
    if key.shape[-2] == 0 or query.numel() == 0:
        return torch.zeros_like(query.transpose(1, 2).contiguous().transpose(1, 2))
    real = torch.float64 if query.dtype == torch.float64 else torch.float32
    q, k, v = (each.to(real) for each in (query, key, value))
    q_codes, times, k_codes = _coded_scores(q, k, factor, 2.0 ** (bits - 1) - 1)
    v_codes, v_scale, v_middle = _coded_values(v)
    powers = [2.0 ** (-n / STEPS) for n in range(STEPS)]
    codes = torch.tensor([int((2**bits - 1) * each + 0.5) for each in powers], device=q.device)
    factors = torch.tensor(powers, dtype=real, device=q.device)
    averages, total, most = torch.zeros_like(q), torch.zeros_like(q[..., :1]), torch.zeros_like(q[..., :1])
    for first in range(0, k.shape[-2], TOGETHER):
        scores = q_codes @ k_codes[..., first : first + TOGETHER, :].mT
        own = scores.amax(-1, keepdim=True)
        top = torch.maximum(most, own) if first else own
        before = _powers(top - most, times, factors) if first else torch.zeros_like(top)
        now, shares = _powers(top - own, times, factors), _shares(own - scores, times, codes)
        averages = averages * before + (shares @ v_codes[..., first : first + TOGETHER, :]) * now
        total, most = total * before + shares.sum(-1, keepdim=True) * now, top
    found = averages * (1 / total) * v_scale + v_middle
    return found.to(query.dtype).transpose(1, 2).contiguous().transpose(1, 2)


def _span(x: Tensor) -> tuple[Tensor, Tensor]:
    """Middle of each channel's range and half its width, which is no number where one of them is not finite."""
    low, high = x.amin(-2, keepdim=True), x.amax(-2, keepdim=True)
    half = (high - low) * 0.5
    return (high + low) * 0.5, torch.where(half < TINY, 0, half) + half * 0


def _coded_scores(q: Tensor, k: Tensor, scale: float, reach: float) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of queries, what their scores are times for steps of a power of two, and codes of keys."""
    middle, half = _span(k)
    balance = torch.exp2((half.frexp().exponent // 2).clamp(-60, 60).to(q.dtype))
    widest = (half / balance).amax(-1, keepdim=True)
    k_scale = torch.where(widest >= TINY, widest / 127, 1)
    k_codes = ((k - middle) * (1 / (balance * k_scale))).round().clamp(-127, 127)
    balanced = q * balance
    most = balanced.abs().amax(-1, keepdim=True)
    inverse = torch.where(most >= TINY, torch.full_like(most, reach) / most, 0)
    q_codes = (balanced * inverse).round().clamp(-reach, reach)
    step = torch.tensor(scale * STEPS * math.log2(math.e), dtype=q.dtype, device=q.device)
    return q_codes, most / reach * ((k_scale + widest * 0) * step), k_codes


def _coded_values(v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of values, their scales and middles."""
    middle, half = _span(v)
    scale = torch.where(half == 0, 1, half / 127)
    return ((v - middle) * (1 / scale)).round().clamp(-127, 127), scale, middle


def _steps(below: Tensor, times: Tensor) -> Tensor:
    """How far scores are below another, in steps; no number is as far as can be."""
    return (below * times).round().clamp(max=32767).nan_to_num(32767).long()


def _shares(below: Tensor, times: Tensor, codes: Tensor) -> Tensor:
    steps = _steps(below, times)
    shift = (steps // STEPS).clamp(max=31)
    return (((2 * codes[steps % STEPS] >> shift) + 1) >> 1).to(below.dtype)


def _powers(below: Tensor, times: Tensor, factors: Tensor) -> Tensor:
    steps = _steps(below, times)
    shift = steps // STEPS
    found = factors[steps % STEPS] * torch.exp2(-shift.clamp(max=126).to(below.dtype))
    return torch.where(shift > 126, 0, found)
