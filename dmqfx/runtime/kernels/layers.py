"""Integer convolution and linear layer by the native kernels; equal to `runtime.integer` bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_int64

import torch
from torch import Tensor
from torch.nn import functional as F

from dmqfx.runtime import integer
from dmqfx.runtime.kernels.library import Layer, Library, library
from dmqfx.runtime.kernels.weights import QUAD, Weights, unpack

__all__ = ["conv2d", "linear"]

Pair = Sequence[int]


def conv2d(
    x_codes: Tensor,
    x_scale: Tensor | None,
    x_zero_point: Tensor,
    group: Tensor | None,
    blob: Tensor,
    weight_shape: Sequence[int],
    w_scale: Tensor,
    bias: Tensor | None,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
    instruction_set: str | None = None,
) -> Tensor:
    """accumulators * (x_scale[group] * w_scale) + bias in the dtype of x_scale; the int32 accumulators without x_scale.

    Shapes: x_codes uint8 or int8 [B, C, H, W]; x_scale, x_zero_point [G, 1]; group int64 [B] or None; blob as
    `weights.pack` makes it of [O, C / groups, h, w]; w_scale [1, O] or [1, 1]; bias [O]. Off the CPU, or
    without the library, it is computed in plain torch.
    Raises: StoreError for a malformed blob; ValueError for a zero point that is no code.
    """
    native = library()
    if native is None or x_codes.device.type != "cpu":
        codes, zero = unpack(blob, weight_shape, groups), x_zero_point.new_zeros(1, 1)
        head = (x_zero_point, group, codes)
        where = (stride, padding, dilation, groups)
        if x_scale is None:
            return integer.conv2d_accumulators(x_codes, *head, zero, *where)
        return integer.conv2d(x_codes, x_scale, *head, w_scale, zero, bias, *where)
    weights = Weights.open(blob, weight_shape, groups)
    batch, channels, height, width = x_codes.shape
    if channels != groups * weights.channels:
        raise ValueError(f"{channels} input channels for weights {list(weight_shape)} in {groups} groups")
    spans = [d * (t - 1) + 1 for d, t in zip(dilation, weights.taps, strict=True)]
    sizes = [
        (size + 2 * pad - span) // step + 1
        for size, pad, span, step in zip((height, width), padding, spans, stride, strict=True)
    ]
    if min(sizes) < 1:
        raise ValueError(f"{height} x {width} with padding {list(padding)} is smaller than the kernel, {spans}")
    codes, zero_points = _rows(x_codes.permute(0, 2, 3, 1), x_zero_point, group, weights)
    layer = Layer(batch, height, width, groups, codes.shape[-1] // groups, weights.out_channels)
    layer.taps, layer.stride, layer.padding, layer.dilation = map(
        _pair, (weights.taps, stride, padding, dilation)
    )
    layer.out_height, layer.out_width = sizes
    positions = sizes[0] * sizes[1]
    layer.out_image, layer.out_channel, layer.out_position = weight_shape[0] * positions, positions, 1
    out = (batch, weight_shape[0], *sizes)
    return _run(native, layer, out, codes, zero_points, weights, (x_scale, group, w_scale, bias), 1, instruction_set)


def linear(
    x_codes: Tensor,
    x_scale: Tensor | None,
    x_zero_point: Tensor,
    group: Tensor | None,
    blob: Tensor,
    weight_shape: Sequence[int],
    w_scale: Tensor,
    bias: Tensor | None,
    instruction_set: str | None = None,
) -> Tensor:
    """As conv2d, of rows.

    Shapes: x_codes [B, ..., K]; weight_shape [O, K].
    Raises: as conv2d.
    """
    native = library()
    if native is None or x_codes.device.type != "cpu":
        codes, zero = unpack(blob, weight_shape, 1), x_zero_point.new_zeros(1, 1)
        if x_scale is None:
            return integer.linear_accumulators(x_codes, x_zero_point, group, codes, zero)
        return integer.linear(x_codes, x_scale, x_zero_point, group, codes, w_scale, zero, bias)
    weights = Weights.open(blob, weight_shape, 1)
    if x_codes.shape[-1] != weights.channels:
        raise ValueError(f"{x_codes.shape[-1]} input channels for weights {list(weight_shape)}")
    out = (*x_codes.shape[:-1], weight_shape[0])
    batch = 1 if group is None else len(group)
    positions = x_codes.numel() // max(1, batch * weights.channels)
    rows = x_codes.reshape(batch, 1, positions, weights.channels)
    codes, zero_points = _rows(rows, x_zero_point, group, weights)
    layer = Layer(batch, 1, positions, 1, codes.shape[-1], weights.out_channels)
    layer.taps = layer.stride = layer.dilation = _pair((1, 1))
    layer.out_height, layer.out_width = 1, positions
    layer.out_image, layer.out_channel, layer.out_position = positions * weight_shape[0], 1, weight_shape[0]
    return _run(native, layer, out, codes, zero_points, weights, (x_scale, group, w_scale, bias), -1, instruction_set)


def _rows(x: Tensor, zero_point: Tensor, group: Tensor | None, weights: Weights) -> tuple[Tensor, Tensor]:
    """Codes with the channels of each group last and filled up to whole quads, and the zero point of each sample.

    Signed codes become unsigned: both move up by 128.
    """
    zero_points = _of_samples(zero_point, group, len(x)).int()
    if x.dtype == torch.int8:
        x, zero_points = x.view(torch.uint8) ^ 128, zero_points + 128
    if weights.channels % QUAD:
        x = x.reshape(*x.shape[:-1], weights.groups, weights.channels)
        x = F.pad(x, (0, -weights.channels % QUAD)).flatten(-2)
    return x.contiguous(), zero_points.contiguous()


def _of_samples(parameter: Tensor, group: Tensor | None, batch: int) -> Tensor:
    """Each sample's own number of [G, 1]."""
    if parameter.shape[1] != 1:
        raise ValueError("an integer layer takes one number per timestep group, not one per input channel")
    if group is None:
        if len(parameter) != 1:
            raise ValueError(f"parameters of {len(parameter)} timestep groups need a group index")
        return parameter[0].expand(batch)
    return parameter[group, 0]


def _run(
    native: Library,
    layer: Layer,
    out: Sequence[int],
    codes: Tensor,
    zero_points: Tensor,
    weights: Weights,
    scaling: tuple[Tensor | None, Tensor | None, Tensor, Tensor | None],
    axis: int,
    instruction_set: str | None,
) -> Tensor:
    """The layer's numbers: in float32 from the kernel itself, in other precisions from its accumulators."""
    x_scale, group, w_scale, bias = scaling
    fused = x_scale is not None and x_scale.dtype == torch.float32
    result = torch.empty(tuple(out), dtype=torch.float32 if fused else torch.int32)
    kept = [codes, zero_points, weights.codes, weights.sums]  # alive until the kernel has read them
    layer.nibbles, layer.pair = weights.nibbles, weights.pair
    layer.codes, layer.zero_points, layer.weights, layer.sums = (each.data_ptr() for each in kept)
    if fused:
        channels = weights.groups * weights.out_channels
        scales = _of_samples(x_scale, group, len(codes)).contiguous()
        kept += [scales, w_scale.float().reshape(-1).expand(channels).contiguous()]
        layer.input_scales, layer.weight_scales, layer.real = scales.data_ptr(), kept[-1].data_ptr(), result.data_ptr()
        if bias is not None:
            kept.append(bias.float().contiguous())
            layer.biases = kept[-1].data_ptr()
    else:
        layer.integer = result.data_ptr()
    if result.numel():
        native.run(layer, instruction_set)
    if x_scale is None or fused:
        return result
    return integer.rescale(result, x_scale, group, w_scale, bias, axis)


def _pair(numbers: Pair) -> object:
    return (c_int64 * 2)(*numbers)
