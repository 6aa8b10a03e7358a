"""Integer convolution and linear layer by the native kernels; equal to `runtime.integer` bit for bit."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dmqfx.runtime import integer
from dmqfx.runtime.kernels.coded import Coded
from dmqfx.runtime.kernels.native import Layer, library, tell_plain
from dmqfx.runtime.kernels.prepared import Operands, Window, prepare
from dmqfx.runtime.kernels.weights import unpack

__all__ = ["conv2d", "linear", "upsampled_sizes"]

Pair = Sequence[int]
_UPSAMPLE = torch.ops.aten.upsample_nearest2d.vec


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
    added: Tensor | None = None,
    upsample_size: Pair | None = None,
    upsample_factors: Sequence[float] | None = None,
    coded: Coded | None = None,
) -> Tensor:
    """accumulators * (x_scale[group] * w_scale) + bias, + added, in the dtype of x_scale; int32 sums without x_scale.

    A shift moves the centered codes of each input channel to the left by its bits; `weights.pack` has seen it.
    A size or factors upsample the codes first, as aten.upsample_nearest2d does. With `coded` the result is the codes of
    that, which needs x_scale. It is laid out channels last.

    Shapes: x_codes uint8 or int8 [B, C, H, W]; x_scale, x_zero_point [G, 1]; group int64 [B] or None; blob as
    `weights.pack` makes it of [O, C / groups, h, w]; w_scale [1, O] or [1, 1]; bias [O]; shift uint8 [G, C];
    added broadcasts to the result. Off the CPU, or without the library, it is computed in plain torch.
    Raises: StoreError for a malformed blob; ValueError for sizes that do not fit or a zero point that is no code.
    """
    operands = Operands(blob, x_scale, x_zero_point, w_scale, bias, shift)
    window, resized = Window(stride, padding, dilation, groups), (upsample_size, upsample_factors)
    if not _is_native(x_codes):
        tell_plain("kernel_conv2d", x_codes, takes="codes on the CPU")
        total = _plain_sums(x_codes, group, weight_shape, operands, window, resized)
        return _last(_finished(total, operands, group, added, coded, 1))
    known = prepare(operands, weight_shape, window, signed=_is_signed(x_codes))
    layer = known.copy()
    if coded is not None and coded.activation == "geglu":
        raise ValueError("geglu is of rows, not of an image")
    in_kernel = coded if operands.real and coded is not None and coded.fits(weight_shape[0]) else None
    dtype = operands.dtype if in_kernel is None else in_kernel.dtype
    out = _placed(layer, x_codes, (weight_shape[0], dtype), known.taps, window, resized)
    x = x_codes.contiguous() if layer.planes else x_codes
    kept = _add(layer, added, out) if added is not None and operands.real else None
    _run(layer, x, group, out, in_kernel, instruction_set)
    del kept
    if operands.real:
        return out if coded is in_kernel or coded is None else coded.of(out, group, 1)
    return _last(_finished(out, operands, group, added, coded, 1))


def _placed(
    layer: Layer,
    x: Tensor,
    made: tuple[int, torch.dtype],
    taps: Pair,
    window: Window,
    resized: tuple[Pair | None, Sequence[float] | None],
) -> Tensor:
    """Sizes of a layer over an image, and room for the channels that it makes of it."""
    batch, channels, height, width = x.shape
    if channels != layer.groups * layer.given:
        raise ValueError(f"{channels} input channels for {layer.given} in each of {layer.groups} groups")
    layer.batch, layer.height, layer.width = batch, height, width
    virtual, factors = upsampled_sizes((height, width), *resized), resized[1]
    layer.upsampled[:] = virtual
    for axis, size in enumerate((height, width) if virtual != (height, width) else ()):
        layer.steps[axis] = size / virtual[axis] if factors is None else 1 / factors[axis]
    layer.out_height, layer.out_width = sizes = _out_sizes(virtual, taps, window)
    layer.planes = not x.is_contiguous(memory_format=torch.channels_last)
    return torch.empty(
        (batch, made[0], *sizes), dtype=made[1], device=x.device, memory_format=torch.channels_last
    )


def _plain_sums(
    x: Tensor,
    group: Tensor | None,
    weight_shape: Sequence[int],
    operands: Operands,
    window: Window,
    resized: tuple[Pair | None, Sequence[float] | None],
) -> Tensor:
    """Accumulators of a convolution in plain torch."""
    codes, zero = (
        unpack(operands.blob, weight_shape, window.groups),
        operands.x_zero_point.new_zeros(1, 1),
    )
    if resized != (None, None):
        x = _UPSAMPLE(x.float(), *resized).to(x.dtype)
    return integer.conv2d_accumulators(
        x, operands.x_zero_point, group, codes, zero, *window, shift=operands.shift
    )


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
    added: Tensor | None = None,
    coded: Coded | None = None,
) -> Tensor:
    """As conv2d, of rows.

    Shapes: x_codes [B, ..., K]; weight_shape [O, K]; shift uint8 [G, K]; added broadcasts to [B, ..., O]. Codes behind
    `geglu` are [B, ..., O / 2]; the kernel itself makes them where O is a multiple of 32.
    Raises: as conv2d.
    """
    operands = Operands(blob, x_scale, x_zero_point, w_scale, bias, shift)
    if not _is_native(x_codes):
        tell_plain("kernel_linear", x_codes, takes="codes on the CPU")
        codes, zero = unpack(blob, weight_shape, 1), x_zero_point.new_zeros(1, 1)
        total = integer.linear_accumulators(x_codes, x_zero_point, group, codes, zero, shift)
        return _finished(total, operands, group, added, coded, -1)
    known = prepare(operands, weight_shape, Window(), signed=_is_signed(x_codes))
    if x_codes.shape[-1] != known.channels:
        raise ValueError(f"{x_codes.shape[-1]} input channels for weights {list(weight_shape)}")
    layer = known.copy()
    rows = _laid_in_rows(layer, x_codes, group)
    wide, lead = weight_shape[0], x_codes.shape[:-1]
    in_kernel = coded if operands.real and coded is not None and coded.fits(wide) else None
    if in_kernel is None:
        out = x_codes.new_empty((*lead, wide), dtype=operands.dtype)
    else:
        out = x_codes.new_empty((*lead, in_kernel.channels(wide)), dtype=in_kernel.dtype)
    if added is not None and operands.real:
        added = added.float().expand((*lead, wide)).contiguous()
        layer.added, layer.added_image, layer.added_position = added.data_ptr(), rows * wide, wide
    _run(layer, x_codes.contiguous(), group, out, in_kernel, instruction_set)
    if operands.real:
        return out if coded is in_kernel or coded is None else coded.of(out, group, -1)
    return _finished(out, operands, group, added, coded, -1)


def _laid_in_rows(layer: Layer, x: Tensor, group: Tensor | None) -> int:
    """Sizes of a layer over rows; how many a sample has."""
    batch = 1 if group is None else group.shape[0]
    if group is not None and (x.dim() < 2 or x.shape[0] != batch):
        raise ValueError(f"{batch} timestep groups for codes {list(x.shape)}")
    rows = math.prod(x.shape[:-1]) // max(1, batch)
    layer.batch, layer.height, layer.out_height = batch, 1, 1
    layer.width = layer.out_width = rows
    layer.upsampled[:] = (1, rows)
    return rows


def upsampled_sizes(
    sizes: Pair, size: Pair | None = None, factors: Sequence[float] | None = None
) -> tuple[int, int]:
    """Height and width that aten.upsample_nearest2d makes of an image; without size and factors, those it has."""
    high, wide = sizes if size is None else size
    if factors is None:
        return high, wide
    return _times(high, factors[0]), _times(wide, factors[1])


def _times(size: int, factor: float) -> int:
    return size * int(factor) if factor == int(factor) else int(size * factor)  # sizes may be symbols


def _is_signed(codes: Tensor) -> bool:
    if codes.dtype not in (torch.int8, torch.uint8):
        raise ValueError(f"codes are int8 or uint8, not {codes.dtype}")
    return codes.dtype == torch.int8


def _is_native(x: Tensor) -> bool:
    return x.is_cpu and library() is not None


def _finished(
    total: Tensor,
    operands: Operands,
    group: Tensor | None,
    added: Tensor | None,
    coded: Coded | None,
    axis: int,
) -> Tensor:
    """Accumulators to real numbers or their codes, if that is asked for, in plain torch."""
    if operands.x_scale is None:
        return total
    real = integer.rescale(total, operands.x_scale, group, operands.w_scale, operands.bias, axis)
    real = real if added is None else real.add_(added)
    return real if coded is None else coded.of(real, group, axis)


def _last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _add(layer: Layer, added: Tensor, out: Tensor) -> Tensor:
    """Have the layer add these numbers to its results; the tensor that comes back has to outlive it."""
    batch, channels, height, width = out.shape
    added = added.float()
    one_position = added.dim() == 4 and added.shape[2:] == (1, 1) and height * width != 1
    if one_position:
        added = added.expand(batch, channels, 1, 1).contiguous()
        layer.added_image, layer.added_position = channels, 0
    else:
        added = _last(added.expand(out.shape))
        layer.added_image, layer.added_position = height * width * channels, channels
    layer.added = added.data_ptr()
    return added


def _run(
    layer: Layer,
    x: Tensor,
    group: Tensor | None,
    out: Tensor,
    coded: Coded | None,
    instruction_set: str | None,
) -> None:
    """The numbers of `out`."""
    if group is not None:
        if group.shape[0] != layer.batch:
            raise ValueError(f"{group.shape[0]} timestep groups for {layer.batch} samples")
        group = group.long().contiguous()
        layer.group = group.data_ptr()
    elif layer.timestep_groups != 1:
        raise ValueError(f"parameters of {layer.timestep_groups} timestep groups need a group index")
    if layer.planes or layer.flip or layer.channels != layer.given:
        arranged = torch.empty(
            layer.batch * layer.height * layer.width * layer.groups * layer.channels, dtype=torch.uint8
        )
        layer.raw, layer.codes = x.data_ptr(), arranged.data_ptr()
    else:
        layer.codes = x.data_ptr()
    native = library()
    if native is None or not out.numel():
        return
    if coded is None:
        setattr(layer, "real" if out.dtype == torch.float32 else "integer", out.data_ptr())
    else:
        coding = coded.coding(layer, group, out)
        layer.coding, layer.parts = ctypes.addressof(coding), (coding,)
    native.run(layer, instruction_set)


def _out_sizes(sizes: Pair, taps: Pair, window: Window) -> tuple[int, int]:
    high, wide = (
        (sizes[k] + 2 * window.padding[k] - window.dilation[k] * (taps[k] - 1) - 1) // window.stride[k] + 1
        for k in (0, 1)
    )
    if min(high, wide) < 1:
        raise ValueError(
            f"{sizes[0]} x {sizes[1]}, padded by {list(window.padding)}, is smaller than the kernel"
        )
    return high, wide
