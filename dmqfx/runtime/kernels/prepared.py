"""What stays the same between calls of a native layer: its weights opened, its tables found, once for all calls."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_int64
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dmqfx.runtime.kernels.kept import Kept, Stamp, stamp
from dmqfx.runtime.kernels.native import Layer
from dmqfx.runtime.kernels.weights import QUAD, Weights

__all__ = ["Operands", "Prepared", "Window", "prepare"]

Pair = Sequence[int]


class Window(NamedTuple):
    """How taps lie over the input: those of a linear layer unless said."""

    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1


class Operands(NamedTuple):
    """The tensors of a layer that stay between calls.

    Shapes: blob as `weights.pack` makes it; x_scale [G, 1], or None for accumulators alone; x_zero_point [G, 1];
    w_scale [1, O] or [1, 1]; bias [O]; shift uint8 [G, C].
    """

    blob: Tensor
    x_scale: Tensor | None
    x_zero_point: Tensor
    w_scale: Tensor
    bias: Tensor | None
    shift: Tensor | None

    @property
    def real(self) -> bool:
        """Whether the kernel makes real numbers: float32, else int32 sums."""
        return self.x_scale is not None and self.x_scale.dtype == torch.float32

    @property
    def dtype(self) -> torch.dtype:
        """Of what the kernel makes."""
        return torch.float32 if self.real else torch.int32


@dataclass(frozen=True, eq=False)
class Prepared:
    """A layer but for its codes, and what it points to; `channels` of one group, before they are filled up."""

    layer: Layer
    channels: int
    taps: tuple[int, int]
    operands: Operands
    kept: tuple[object, ...]
    sizes: tuple[object, ...]
    stamp: Stamp

    def copy(self) -> Layer:
        """The layer, to be filled in; it keeps its tables."""
        made = Layer.from_buffer_copy(self.layer)
        made.kept = self
        return made

    def serves(self, operands: Operands, sizes: tuple[object, ...]) -> bool:
        """Whether it was made of these tensors, as they are now."""
        return (
            all(mine is theirs for mine, theirs in zip(self.operands[1:], operands[1:], strict=True))
            and self.sizes == sizes
            and self.stamp == stamp(*operands)
        )


_KNOWN: Kept[Prepared] = Kept()


def prepare(operands: Operands, weight_shape: Sequence[int], window: Window, *, signed: bool) -> Prepared:
    """The layer of these operands, kept as long as its blob is; `signed` codes are moved up by 128.

    Raises: StoreError for a malformed blob; ValueError for tables that do not fit it, or each other.
    """
    sizes = (signed, *map(tuple, (weight_shape, *window[:3])), window.groups)
    known = _KNOWN.get(operands.blob)
    if known is not None and known.serves(operands, sizes):
        return known
    weights = Weights.open(operands.blob, weight_shape, window.groups)
    layer, tables = _layer(weights, window), _tables(operands, weights, signed)
    layer.flip, layer.timestep_groups = 128 * signed, len(operands.x_zero_point)
    for name, tensor in {
        **tables,
        "weights": weights.codes,
        "sums": weights.sums,
        "runs": weights.runs,
    }.items():
        setattr(layer, name, tensor.data_ptr())
    kept = (*tables.values(), operands.blob.untyped_storage())  # a view of the blob would keep that itself
    without_blob = operands._replace(blob=operands.x_zero_point)
    counted = not any(each is not None and each.is_inference() for each in operands)
    now = stamp(*operands) if counted else []
    found = Prepared(layer, weights.channels, weights.taps, without_blob, kept, sizes, now)
    if counted:  # nobody counts what is written into the others
        _KNOWN.keep(operands.blob, found)
    return found


def _layer(weights: Weights, window: Window) -> Layer:
    """Sizes alone."""
    layer = Layer(
        groups=weights.groups, out_channels=weights.out_channels, given=weights.channels,
        channels=weights.channels + -weights.channels % QUAD, nibbles=weights.nibbles,
        folded=weights.folded, headroom=weights.headroom,
    )  # fmt: skip
    layer.pair = weights.pair
    layer.taps, layer.stride, layer.padding, layer.dilation = (
        (c_int64 * 2)(*pair) for pair in (weights.taps, window.stride, window.padding, window.dilation)
    )
    return layer


def _tables(operands: Operands, weights: Weights, signed: bool) -> dict[str, Tensor]:
    """What the layer points to, by the name of its field."""
    channels = weights.groups * weights.out_channels
    tables = {"zero_points": _numbers(operands.x_zero_point).int() + 128 * signed}
    if (shift := operands.shift) is not None:
        given = weights.groups * weights.channels
        if shift.dtype != torch.uint8 or shift.shape[1] != given:
            raise ValueError(
                f"a shift {shift.dtype} {list(shift.shape)} for {given} input channels, not uint8 [G, C]"
            )
        tables["shifts"] = shift
    if operands.real and operands.x_scale is not None:
        tables["input_scales"] = _numbers(operands.x_scale)
        tables["weight_scales"] = operands.w_scale.float().reshape(-1).expand(channels)
        if operands.bias is not None:
            tables["biases"] = operands.bias.float().expand(channels)
    rows = {name: len(tables[name]) for name in ("zero_points", "input_scales", "shifts") if name in tables}
    if len(set(rows.values())) > 1:
        raise ValueError(f"tables of one input have rows for other numbers of timestep groups: {rows}")
    return {name: each.detach().contiguous() for name, each in tables.items()}


def _numbers(parameter: Tensor) -> Tensor:
    """[G] of [G, 1]."""
    if parameter.shape[1] != 1:
        raise ValueError("an integer layer takes one number per timestep group, not one per input channel")
    return parameter[:, 0]
