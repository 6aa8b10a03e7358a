"""Integer convolution and linear layer by the native kernels; equal to `runtime.integer` bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_int64
from dataclasses import dataclass

import torch
from torch import Tensor

from dmqfx.runtime import integer
from dmqfx.runtime.kernels.native import Layer, library
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
    shift: Tensor | None = None,
) -> Tensor:
    """accumulators * (x_scale[group] * w_scale) + bias in the dtype of x_scale; the int32 accumulators without x_scale.

    A shift moves the centered codes of each input channel to the left by its bits; `weights.pack` has seen it.

    Shapes: x_codes uint8 or int8 [B, C, H, W]; x_scale, x_zero_point [G, 1]; group int64 [B] or None; blob as
    `weights.pack` makes it of [O, C / groups, h, w]; w_scale [1, O] or [1, 1]; bias [O]; shift uint8 [G, C]. Off
    the CPU, or without the library, it is computed in plain torch.
    Raises: StoreError for a malformed blob; ValueError for sizes that do not fit or a zero point that is no code.
    """
    epilogue = _Epilogue(x_scale, group, w_scale, bias, 1)
    if not _is_native(x_codes):
        codes, zero = unpack(blob, weight_shape, groups), x_zero_point.new_zeros(1, 1)
        where = (stride, padding, dilation, groups, shift)
        return epilogue.apply(integer.conv2d_accumulators(x_codes, x_zero_point, group, codes, zero, *where))
    weights = Weights.open(blob, weight_shape, groups)
    batch, channels, height, width = x_codes.shape
    if channels != groups * weights.channels:
        raise ValueError(f"{channels} input channels for weights {list(weight_shape)} in {groups} groups")
    layer = Layer(batch=batch, height=height, width=width)
    layer.stride, layer.padding, layer.dilation = map(_pair, (stride, padding, dilation))
    sizes = _out_sizes((height, width), weights.taps, stride, padding, dilation)
    layer.out_height, layer.out_width = sizes
    layer.out_position, layer.out_channel = 1, sizes[0] * sizes[1]
    layer.out_image = weight_shape[0] * layer.out_channel
    layer.planes = not x_codes.is_contiguous(memory_format=torch.channels_last)
    x = x_codes.contiguous() if layer.planes else x_codes
    out = (batch, weight_shape[0], *sizes)
    return _run(layer, x, x_zero_point, shift, weights, epilogue, out, instruction_set)


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
    shift: Tensor | None = None,
) -> Tensor:
    """As conv2d, of rows.

    Shapes: x_codes [B, ..., K]; weight_shape [O, K]; shift uint8 [G, K].
    Raises: as conv2d.
    """
    epilogue = _Epilogue(x_scale, group, w_scale, bias, -1)
    if not _is_native(x_codes):
        codes, zero = unpack(blob, weight_shape, 1), x_zero_point.new_zeros(1, 1)
        return epilogue.apply(integer.linear_accumulators(x_codes, x_zero_point, group, codes, zero, shift))
    weights = Weights.open(blob, weight_shape, 1)
    if x_codes.shape[-1] != weights.channels:
        raise ValueError(f"{x_codes.shape[-1]} input channels for weights {list(weight_shape)}")
    batch = 1 if group is None else len(group)
    rows = x_codes.numel() // max(1, batch * weights.channels)
    layer = Layer(batch=batch, height=1, width=rows, out_height=1, out_width=rows)
    layer.stride = layer.dilation = _pair((1, 1))
    layer.out_image, layer.out_channel, layer.out_position = rows * weight_shape[0], 1, weight_shape[0]
    out = (*x_codes.shape[:-1], weight_shape[0])
    return _run(layer, x_codes.contiguous(), x_zero_point, shift, weights, epilogue, out, instruction_set)


@dataclass(frozen=True, eq=False)
class _Epilogue:
    """From accumulators to real numbers: what float32 layers have the kernel do."""

    x_scale: Tensor | None
    group: Tensor | None
    w_scale: Tensor
    bias: Tensor | None
    axis: int

    @property
    def fused(self) -> bool:
        return self.x_scale is not None and self.x_scale.dtype == torch.float32

    def apply(self, total: Tensor) -> Tensor:
        if self.x_scale is None:
            return total
        return integer.rescale(total, self.x_scale, self.group, self.w_scale, self.bias, self.axis)


def _is_native(x: Tensor) -> bool:
    return x.device.type == "cpu" and library() is not None


def _run(
    layer: Layer,
    x: Tensor,
    zero_point: Tensor,
    shift: Tensor | None,
    weights: Weights,
    epilogue: _Epilogue,
    out: Sequence[int],
    instruction_set: str | None,
) -> Tensor:
    """The layer's numbers: in float32 from the kernel itself, in other precisions from its accumulators."""
    result = torch.empty(tuple(out), dtype=torch.float32 if epilogue.fused else torch.int32)
    layer.groups, layer.out_channels, layer.given = weights.groups, weights.out_channels, weights.channels
    layer.channels = weights.channels + -weights.channels % QUAD
    layer.taps, layer.nibbles = _pair(weights.taps), weights.nibbles
    layer.pair, layer.headroom = weights.pair, weights.headroom
    layer.flip = 128 if x.dtype == torch.int8 else 0
    zero_points = (_of_samples(zero_point, epilogue.group, layer.batch).int() + layer.flip).contiguous()
    kept = [x, zero_points, weights.codes, weights.sums, result]  # alive until the kernel is done
    layer.zero_points, layer.weights, layer.sums = (each.data_ptr() for each in kept[1:4])
    if layer.planes or layer.flip or layer.channels != layer.given:
        pixels = layer.batch * layer.height * layer.width
        kept.append(torch.empty(pixels * layer.groups * layer.channels, dtype=torch.uint8))
        layer.raw, layer.codes = x.data_ptr(), kept[-1].data_ptr()
    else:
        layer.codes = x.data_ptr()
    if shift is not None:
        kept.append(_shifts(shift, epilogue.group, (layer.batch, layer.groups * layer.given)))
        layer.shifts = kept[-1].data_ptr()
    if epilogue.fused:
        kept += _scales(layer, epilogue)
        layer.real = result.data_ptr()
    else:
        layer.integer = result.data_ptr()
    native = library()
    if result.numel() and native is not None:
        native.run(layer, instruction_set)
    return result if epilogue.fused else epilogue.apply(result)


def _scales(layer: Layer, epilogue: _Epilogue) -> list[Tensor]:
    """Hand the kernel its scales and bias; the tensors have to outlive it."""
    channels = layer.groups * layer.out_channels
    input_scale = epilogue.x_scale if epilogue.x_scale is not None else epilogue.w_scale
    kept = [
        _of_samples(input_scale, epilogue.group, layer.batch).contiguous(),
        epilogue.w_scale.float().reshape(-1).expand(channels).contiguous(),
    ]
    layer.input_scales, layer.weight_scales = (each.data_ptr() for each in kept)
    if epilogue.bias is not None:
        kept.append(epilogue.bias.float().contiguous())
        layer.biases = kept[-1].data_ptr()
    return kept


def _shifts(shift: Tensor, group: Tensor | None, sizes: tuple[int, int]) -> Tensor:
    """Each sample's own row of [G, C]."""
    if shift.dtype != torch.uint8 or shift.shape[1] != sizes[1]:
        raise ValueError(
            f"a shift {shift.dtype} {list(shift.shape)} for {sizes[1]} input channels, not uint8 [G, C]"
        )
    if group is None and len(shift) != 1:
        raise ValueError(f"shifts of {len(shift)} timestep groups need a group index")
    return (shift.expand(sizes) if group is None else shift[group]).contiguous()


def _of_samples(parameter: Tensor, group: Tensor | None, batch: int) -> Tensor:
    """Each sample's own number of [G, 1]."""
    if parameter.shape[1] != 1:
        raise ValueError("an integer layer takes one number per timestep group, not one per input channel")
    if group is None:
        if len(parameter) != 1:
            raise ValueError(f"parameters of {len(parameter)} timestep groups need a group index")
        return parameter[0].expand(batch)
    return parameter[group, 0]


def _out_sizes(sizes: Pair, taps: Pair, stride: Pair, padding: Pair, dilation: Pair) -> tuple[int, int]:
    high, wide = (
        (sizes[k] + 2 * padding[k] - dilation[k] * (taps[k] - 1) - 1) // stride[k] + 1 for k in (0, 1)
    )
    if min(high, wide) < 1:
        raise ValueError(f"{sizes[0]} x {sizes[1]}, padded by {list(padding)}, is smaller than the kernel")
    return high, wide


def _pair(numbers: Pair) -> object:
    return (c_int64 * 2)(*numbers)
