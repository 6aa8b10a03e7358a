"""What the operators make, for tensors without numbers: shapes, dtypes and layouts; for torch.export and passes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dmqfx.runtime.kernels import codes, layers

__all__ = [
    "attention",
    "dequantize",
    "kernel_conv2d",
    "kernel_linear",
    "kernel_quantize",
    "qconv2d",
    "qlinear",
    "quantize",
    "timestep_group",
    "unpack",
]


def timestep_group(timestep: Tensor, boundaries: Tensor) -> Tensor:
    return torch.empty_like(timestep, dtype=torch.int64)


def quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, group: Tensor | None, axis: int, qmin: int, qmax: int
) -> Tensor:
    return torch.empty_like(x, dtype=torch.uint8 if qmin >= 0 else torch.int8)


def dequantize(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group: Tensor | None = None,
    axis: int = 0,
    shift: Tensor | None = None,
) -> Tensor:
    return torch.empty_like(codes, dtype=scale.dtype)


def unpack(packed: Tensor, bits: int, signed: bool, shape: Sequence[int]) -> Tensor:
    return packed.new_empty(tuple(shape), dtype=torch.int8 if signed else torch.uint8)


def qconv2d(
    x_codes: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    group: Tensor | None,
    packed_weight: Tensor,
    bits: int,
    signed: bool,
    weight_shape: Sequence[int],
    w_scale: Tensor,
    w_zero_point: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    shift: Tensor | None = None,
) -> Tensor:
    shape = _convolved(x_codes.shape[0], x_codes.shape[2:], weight_shape, stride, padding, dilation)
    return x_scale.new_empty(shape)


def qlinear(
    x_codes: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    group: Tensor | None,
    packed_weight: Tensor,
    bits: int,
    signed: bool,
    weight_shape: Sequence[int],
    w_scale: Tensor,
    w_zero_point: Tensor,
    bias: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    return x_scale.new_empty([*x_codes.shape[:-1], weight_shape[0]])


def kernel_conv2d(
    x_codes: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    group: Tensor | None,
    packed_weight: Tensor,
    bits: int,
    weight_shape: Sequence[int],
    w_scale: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    shift: Tensor | None = None,
    added: Tensor | None = None,
    upsample_size: Sequence[int] | None = None,
    upsample_factors: Sequence[float] | None = None,
    channels_last: bool = False,
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
    out_qmin: int = 0,
    out_qmax: int = 255,
    activation: str = "none",
) -> Tensor:
    sizes = layers.upsampled_sizes(x_codes.shape[2:], upsample_size, upsample_factors)
    shape = _convolved(x_codes.shape[0], sizes, weight_shape, stride, padding, dilation)
    how = torch.channels_last if channels_last else torch.contiguous_format
    dtype = _dtype(x_scale, out_scale, out_qmin)
    return torch.empty(shape, dtype=dtype, device=x_codes.device, memory_format=how)


def kernel_linear(
    x_codes: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    group: Tensor | None,
    packed_weight: Tensor,
    bits: int,
    weight_shape: Sequence[int],
    w_scale: Tensor,
    bias: Tensor | None = None,
    shift: Tensor | None = None,
    added: Tensor | None = None,
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
    out_qmin: int = 0,
    out_qmax: int = 255,
    activation: str = "none",
) -> Tensor:
    wide = weight_shape[0] // 2 if activation == "geglu" else weight_shape[0]
    return x_scale.new_empty([*x_codes.shape[:-1], wide], dtype=_dtype(x_scale, out_scale, out_qmin))


def _dtype(x_scale: Tensor, out_scale: Tensor | None, qmin: int) -> torch.dtype:
    """Of a layer's results, or of their codes."""
    if out_scale is None:
        return x_scale.dtype
    return torch.int8 if qmin < 0 else torch.uint8


def kernel_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group: Tensor | None,
    axis: int,
    qmin: int,
    qmax: int,
    norm: str = "none",
    norm_groups: int = 1,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 0.0,
    activation: str = "none",
    beside: Tensor | None = None,
    norm_scale: Tensor | None = None,
    norm_shift: Tensor | None = None,
) -> Tensor:
    return codes.laid_out(x, axis, qmin, activation, beside)


def group_norm_silu(
    x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.empty_like(x, memory_format=torch.channels_last if last else torch.contiguous_format)


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None, bits: int = 8) -> Tensor:
    batch, heads, queries, width = query.shape
    return query.new_empty([batch, queries, heads, width]).transpose(1, 2)


def _convolved(
    batch: int,
    sizes: Sequence[int],
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """The shape of the result of a convolution."""
    spatial = [
        (size + 2 * pad - spacing * (tap - 1) - 1) // step + 1
        for size, tap, step, pad, spacing in zip(
            sizes, weight_shape[2:], stride, padding, dilation, strict=True
        )
    ]
    return [batch, weight_shape[0], *spatial]
