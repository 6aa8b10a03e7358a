"""Exact integer convolution and linear layer in plain torch: the measure of every faster kernel.

torch has no integer convolution on a CPU, so integers travel in floats that hold them exactly. float32 does
while the magnitudes of a sum add up to at most 2^24, in any order (operands below 256, times a power of two,
survive even bfloat16 products); a longer sum is cut into blocks of input channels that fit, and float64 carries
the rest.

A shift [G, C] moves the centered codes of input channel c to the left by its bits: power-of-two steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dmqfx.numbers.quant import powers_of_two, spread
from dmqfx.numbers.scaling import column_factor

__all__ = [
    "centered_weight",
    "conv2d",
    "conv2d_accumulators",
    "linear",
    "linear_accumulators",
    "overflow",
    "rescale",
]

_EXACT_IN_FLOAT32 = 2**24
_GREATEST_ACTIVATION = 255  # of an 8 bit code minus a zero point that is a code too


def conv2d_accumulators(
    x_codes: Tensor,
    x_zero_point: Tensor,
    group: Tensor | None,
    w_codes: Tensor,
    w_zero_point: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    shift: Tensor | None = None,
) -> Tensor:
    """int32 convolution of (x_codes - x_zero_point) << shift with w_codes - w_zero_point, zero-padded, bit for bit.

    Shapes: x_codes [B, C, H, W]; x_zero_point [G, 1]; group int64 [B] or None; w_codes [O, C / groups, h, w];
    w_zero_point [1, O] or [1, 1]; shift uint8 [G, C] or None.
    Raises: ValueError if activation codes exist that overflow int32 with these weights.
    """
    carrier = _convolution(stride, padding, dilation, groups)
    x = _centered(x_codes, x_zero_point, group, shift, 1)
    return carrier.accumulate(x, centered_weight(w_codes, w_zero_point), shift).int()


def linear_accumulators(
    x_codes: Tensor,
    x_zero_point: Tensor,
    group: Tensor | None,
    w_codes: Tensor,
    w_zero_point: Tensor,
    shift: Tensor | None = None,
) -> Tensor:
    """int32 product of (x_codes - x_zero_point) << shift with w_codes - w_zero_point, bit for bit.

    Shapes: x_codes [B, ..., K]; x_zero_point [G, 1]; group int64 [B] or None; w_codes [O, K]; w_zero_point
    [1, O] or [1, 1]; shift uint8 [G, K] or None.
    Raises: ValueError if activation codes exist that overflow int32 with these weights.
    """
    x = _centered(x_codes, x_zero_point, group, shift, -1)
    return _LINEAR.accumulate(x, centered_weight(w_codes, w_zero_point), shift).int()


def conv2d(
    x_codes: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    group: Tensor | None,
    w_codes: Tensor,
    w_scale: Tensor,
    w_zero_point: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    shift: Tensor | None = None,
) -> Tensor:
    """accumulators * (x_scale[group] * w_scale) + bias in the dtype of x_scale.

    Shapes: as for conv2d_accumulators; x_scale [G, 1], w_scale [1, O] or [1, 1], bias [O].
    Raises: ValueError as conv2d_accumulators, or for a scale per input channel.
    """
    carrier = _convolution(stride, padding, dilation, groups)
    x = _centered(x_codes, x_zero_point, group, shift, 1)
    total = carrier.accumulate(x, centered_weight(w_codes, w_zero_point), shift)
    return rescale(total, x_scale, group, w_scale, bias, 1)


def linear(
    x_codes: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    group: Tensor | None,
    w_codes: Tensor,
    w_scale: Tensor,
    w_zero_point: Tensor,
    bias: Tensor | None,
    shift: Tensor | None = None,
) -> Tensor:
    """accumulators * (x_scale[group] * w_scale) + bias in the dtype of x_scale.

    Shapes: as for linear_accumulators; x_scale [G, 1], w_scale [1, O] or [1, 1], bias [O].
    Raises: ValueError as linear_accumulators, or for a scale per input channel.
    """
    x = _centered(x_codes, x_zero_point, group, shift, -1)
    total = _LINEAR.accumulate(x, centered_weight(w_codes, w_zero_point), shift)
    return rescale(total, x_scale, group, w_scale, bias, -1)


@dataclass(frozen=True)
class _Carrier:
    """A sum of products, and how it may be cut; input channels lie on `axis` of x and on dim 1 of w."""

    product: Callable[[Tensor, Tensor], Tensor]
    axis: int
    can_cut: bool = True

    def accumulate(self, x: Tensor, w: Tensor, shift: Tensor | None = None) -> Tensor:
        """Exact integers in whatever dtype held them; x is shifted already."""
        if (why := overflow(w, shift)) is not None:
            raise ValueError(why)
        return self._sum(x, w) if _direct(x) else self.product(x.double(), w.double()).round()

    def _sum(self, x: Tensor, w: Tensor) -> Tensor:
        if _greatest(x) * _greatest_row(w) <= _EXACT_IN_FLOAT32:
            return self.product(x, w)
        channels = w.shape[1]
        if not self.can_cut or channels == 1:
            return self.product(x.double(), w.double())
        halves = [channels // 2, channels - channels // 2]
        parts = zip(torch.split(x, halves, self.axis), torch.split(w, halves, 1), strict=True)
        first, second = (self._sum(*part).int() for part in parts)
        return first.add_(second)


_LINEAR = _Carrier(F.linear, axis=-1)


def overflow(w: Tensor, shift: Tensor | None = None) -> str | None:
    """Why activation codes exist that overflow int32 with these weights, or None: then no such codes exist.

    Shapes: w [O, C / groups, ...], centered codes; shift uint8 [G, C] or None.
    """
    reach = w
    if shift is not None:
        reach = w * column_factor(w.shape, powers_of_two(shift.amax(0)).to(w))
    total = _greatest_row(reach)
    if total * _GREATEST_ACTIVATION < 2**31:
        return None
    shifted = ", shifted by the steps of the input's channels" if shift is not None else ""
    return (
        f"weight {list(w.shape)} has an output channel whose codes{shifted} add up to {total} in magnitude: "
        "8 bit activations could overflow int32; keep it in float or give it fewer bits"
    )


def _convolution(
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> _Carrier:
    def product(x: Tensor, w: Tensor) -> Tensor:
        return F.conv2d(x, w, None, tuple(stride), tuple(padding), tuple(dilation), groups)

    return _Carrier(product, axis=1, can_cut=groups == 1)


def _centered(
    codes: Tensor, zero_point: Tensor, group: Tensor | None, shift: Tensor | None, axis: int
) -> Tensor:
    if zero_point.shape[1] != 1:
        raise ValueError(
            "an integer layer takes one zero point per timestep group, not one per input channel"
        )
    centered = codes.float().sub_(spread(zero_point, group, 0, codes.dim()))
    if shift is not None:
        centered.mul_(spread(powers_of_two(shift), group, axis, codes.dim()))
    return centered


def centered_weight(codes: Tensor, zero_point: Tensor) -> Tensor:
    """Codes minus their zero points, in float32, which holds them exactly.

    Shapes: codes [O, ...]; zero_point [1, O] or [1, 1].
    """
    return codes.float().sub_(spread(zero_point, None, 0, codes.dim()))


def _direct(x: Tensor) -> bool:
    """Whether products are summed as they are, and not by way of a Winograd or Fourier transform."""
    return x.device.type == "cpu" and torch._C._has_mkldnn and torch._C._get_mkldnn_enabled()


def _greatest(x: Tensor) -> int:
    return int(torch.linalg.vector_norm(x, torch.inf)) if x.numel() else 0


def _greatest_row(w: Tensor) -> int:
    """The greatest sum of magnitudes over output channels; exact below 2^24, where it matters."""
    return int(torch.linalg.vector_norm(w.flatten(1), 1, 1).amax())


def rescale(
    total: Tensor, x_scale: Tensor, group: Tensor | None, w_scale: Tensor, bias: Tensor | None, axis: int
) -> Tensor:
    """total * (x_scale[group] * w_scale) + bias in the dtype of x_scale.

    Shapes: total [B, ...] with O channels on `axis`; x_scale [G, 1]; group int64 [B] or None; w_scale [1, O] or
    [1, 1]; bias [O]. A floating total is overwritten.
    Raises: ValueError for a scale per input channel.
    """
    if x_scale.shape[1] != 1:
        raise ValueError(
            "an integer layer takes one input scale per timestep group, not one per input channel"
        )
    rows = x_scale[:1] if group is None else x_scale[group]
    shape = [len(rows)] + [1] * (total.dim() - 1)
    shape[axis] = w_scale.shape[1]
    real = total.to(x_scale.dtype).mul_((rows * w_scale).reshape(shape))
    if bias is not None:
        shape[0], shape[axis] = 1, len(bias)
        real.add_(bias.to(real.dtype).reshape(shape))
    return real.contiguous()
