"""Arithmetic of quantization: what a scale is, how a number becomes a code. Knows no graph, no policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dmqfx.errors import CalibrationError

__all__ = [
    "Grid",
    "Per",
    "QParams",
    "QuantSpec",
    "RangeMethod",
    "dequantize",
    "fake_quantize",
    "params_from_range",
    "powers_of_two",
    "qrange",
    "quantize",
]

Grid = Literal["symmetric", "affine"]
Per = Literal["tensor", "channel"]
RangeMethod = Literal["minmax", "mse", "percentile", "ema"]


@dataclass(frozen=True)
class QuantSpec:
    """How one tensor is asked to be quantized.

    Shapes: boundaries is sorted and has G - 1 entries for G timestep groups; () is the static case.
    Units: bits 2..8; boundaries in timesteps as the UNet receives them.
    Example:
        >>> print(QuantSpec(4, "symmetric", "channel", "mse"))
        4 bit symmetric per channel mse
    """

    bits: int
    grid: Grid = "affine"
    per: Per = "tensor"
    range: RangeMethod = "minmax"
    boundaries: tuple[float, ...] = ()

    def __str__(self) -> str:
        groups = f" x{len(self.boundaries) + 1}" if self.boundaries else ""
        return f"{self.bits} bit {self.grid} per {self.per} {self.range}{groups}"


@dataclass(frozen=True, eq=False)
class QParams:
    """real = (code - zero_point) * scale, with code in [qmin, qmax].

    Shapes: scale, zero_point [G, C]: G timestep groups (1 = static), C channels on `axis` (1 = per tensor).

    Example:
        >>> params = params_from_range(torch.tensor([[-1.0]]), torch.tensor([[2.0]]), QuantSpec(8), None)
        >>> params.qmin, params.qmax, params.zero_point.tolist()
        (0, 255, [[85]])
    """

    scale: Tensor
    zero_point: Tensor
    qmin: int
    qmax: int
    axis: int | None
    boundaries: tuple[float, ...] = ()


def qrange(spec: QuantSpec) -> tuple[int, int]:
    """The least and the greatest code: unsigned on the affine grid, two's complement on the symmetric one.

    Example:
        >>> qrange(QuantSpec(4, "affine")), qrange(QuantSpec(4, "symmetric"))
        ((0, 15), (-8, 7))
    """
    if spec.grid == "affine":
        return 0, 2**spec.bits - 1
    return -(2 ** (spec.bits - 1)), 2 ** (spec.bits - 1) - 1


def params_from_range(low: Tensor, high: Tensor, spec: QuantSpec, axis: int | None) -> QParams:
    """The finest grid that reaches from low to high and has 0 on it.

    Zero points are integers in [qmin, qmax]; an all-zero range gets scale 1; scales are normal numbers.

    Shapes: low, high [G, C]; C becomes 1 (and axis None) if the spec is per tensor; zero points are int32,
    scales float32 (float64 for float64 bounds).
    Raises: CalibrationError if a bound is not finite or low > high, ValueError if G does not fit the spec.
    """
    if low.shape != high.shape or low.dim() != 2 or low.shape[0] != len(spec.boundaries) + 1:
        expected = f"[{len(spec.boundaries) + 1}, C]"
        raise ValueError(
            f"low {list(low.shape)} and high {list(high.shape)} should both be {expected} for {spec}"
        )
    _check_range(low, high)
    kept = torch.float64 if low.dtype == torch.float64 else torch.float32
    low, high = low.double().clamp(max=0), high.double().clamp(min=0)
    if spec.per == "tensor":
        low, high, axis = low.amin(1, keepdim=True), high.amax(1, keepdim=True), None
    qmin, qmax = qrange(spec)
    span = qmax - qmin  # each bound is divided on its own: the difference of two huge ones could overflow
    step = high / span - low / span if spec.grid == "affine" else torch.maximum(high / qmax, low / qmin)
    scale = step.where(step > 0, 1.0).to(kept).clamp(min=torch.finfo(kept).tiny)
    if spec.grid == "affine":
        zero_point = (qmin - low / scale.double()).round().clamp(qmin, qmax).to(torch.int32)
    else:
        zero_point = torch.zeros_like(scale, dtype=torch.int32)
    return QParams(scale, zero_point, qmin, qmax, axis, spec.boundaries)


def quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, group: Tensor | None, axis: int, qmin: int, qmax: int
) -> Tensor:
    """code = clamp(round(x / scale) + zero_point, qmin, qmax) in the dtype of scale; ties go to even.

    Shapes: x [B, ...], scale and zero_point [G, C] or [G, 1] with C channels on `axis` of x; group int64 [B]
    picks the row for each entry of dim 0 (so dim 0 of x must be the batch of the UNet); None if G is 1. Codes
    are uint8 if qmin >= 0, else int8, in the memory layout of x.
    """
    codes = torch.empty_like(x, dtype=scale.dtype)
    torch.div(x, spread(scale, group, axis, x.dim()), out=codes)
    codes.round_().add_(spread(zero_point, group, axis, x.dim())).clamp_(qmin, qmax)
    if qmin < 0:
        return codes.to(torch.int8)
    return codes.to(torch.int16).to(torch.uint8)  # by way of int16 it is vectorised, three times as fast


def dequantize(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group: Tensor | None = None,
    axis: int = 0,
    shift: Tensor | None = None,
) -> Tensor:
    """real = (code - zero_point) * scale * 2^shift in the dtype of scale; without a shift it is 0.

    Shapes: as for quantize; shift uint8 [G, C].
    """
    step = scale if shift is None else scale * powers_of_two(shift).to(scale.dtype)
    real = codes.to(scale.dtype).sub_(spread(zero_point, group, axis, codes.dim()))
    return real.mul_(spread(step, group, axis, codes.dim()))


def powers_of_two(shift: Tensor) -> Tensor:
    """2^shift as int32.

    Shapes: shift uint8, any; its numbers are below 31.
    Example:
        >>> powers_of_two(torch.tensor([0, 3], dtype=torch.uint8))
        tensor([1, 8], dtype=torch.int32)
    """
    return torch.ones_like(shift, dtype=torch.int32) << shift.to(torch.int32)


def fake_quantize(x: Tensor, params: QParams, group: Tensor | None = None) -> Tensor:
    """x rounded to the grid, in the dtype of params.scale.

    Example:
        >>> low, high = torch.tensor([[-1.0]]), torch.tensor([[2.0]])
        >>> params = params_from_range(low, high, QuantSpec(2), None)
        >>> fake_quantize(torch.tensor([-3.0, 0.0, 0.6, 9.0]), params)
        tensor([-1.,  0.,  1.,  2.])
    """
    axis = params.axis or 0
    codes = quantize(x, params.scale, params.zero_point, group, axis, params.qmin, params.qmax)
    return dequantize(codes, params.scale, params.zero_point, group, axis)


def spread(values: Tensor, group: Tensor | None, axis: int, dims: int) -> Tensor:
    """A parameter [G, C] laid out to broadcast against a tensor of `dims` dimensions.

    Raises: ValueError if there are several groups but no index, or channels on the dim that the index uses.
    """
    channels = values.shape[1]
    shape = [1] * dims
    if channels > 1:
        shape[axis] = channels
    if group is None:
        if len(values) != 1:
            raise ValueError(f"parameters of {len(values)} timestep groups need a group index")
        return values.reshape(shape)
    if channels > 1 and axis % dims == 0:
        raise ValueError("timestep groups index dim 0, so channels cannot lie on axis 0 as well")
    return values[group].reshape([len(group), *shape[1:]])


def _check_range(low: Tensor, high: Tensor) -> None:
    bad = ~(torch.isfinite(low) & torch.isfinite(high) & (low <= high))
    if bool(bad.any()):
        group, channel = bad.nonzero()[0].tolist()
        found = f"[{low[group, channel].item():g}, {high[group, channel].item():g}]"
        where = f"channel {channel}" + (f" of timestep group {group}" if low.shape[0] > 1 else "")
        raise CalibrationError(f"the range of {where} is {found}, which is not finite and ordered")
