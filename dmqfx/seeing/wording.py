"""How values, shapes, numbers and table entries are written wherever people read."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor, fx

from dmqfx.graph.table import (
    Bias,
    ChannelScale,
    Codes,
    LayerPair,
    Planned,
    Range,
    Sensitivity,
    Shift,
    SkipArm,
    SkipConcat,
)
from dmqfx.numbers.quant import QParams

__all__ = ["argument", "bit_count", "columns", "count", "entry", "interval", "number", "shape", "size"]


def number(value: float) -> str:
    """Three digits.

    Example:
        >>> number(0.012345), number(12345.0), number(float("inf"))
        ('0.0123', '12345', 'inf')
    """
    return f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"


def count(amount: float) -> str:
    """A large number with a decimal prefix.

    Example:
        >>> count(512), count(2_345_678)
        ('512', '2.35 M')
    """
    scaled, prefixes = amount, iter(("", " k", " M", " G"))
    prefix = next(prefixes)
    while scaled >= 1000 and prefix != " G":
        scaled, prefix = scaled / 1000, next(prefixes)
    return f"{number(scaled)}{prefix}"


def size(amount: float) -> str:
    """A number of bytes.

    Example:
        >>> size(512), size(2_345_678)
        ('512 B', '2.35 MB')
    """
    scaled = count(amount)
    return f"{scaled}B" if " " in scaled else f"{scaled} B"


def columns(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> str:
    """Rows of cells as lines of equal columns, two spaces apart; those in `right` are set to the right.

    Example:
        >>> print(columns([["layer", "bits"], ["conv_in", "8"]], right={1}))
        layer    bits
        conv_in     8
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = (
        [
            cell.rjust(w) if k in right else cell.ljust(w)
            for k, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        for row in rows
    )
    return "\n".join("  ".join(row).rstrip() for row in cells)


def interval(low: Tensor, high: Tensor) -> str:
    """From the least to the greatest number of two tensors."""
    return f"[{number(low.min().item())}, {number(high.max().item())}]"


def bit_count(qmin: int, qmax: int) -> int:
    """The bits that a code from qmin to qmax needs.

    Example:
        >>> bit_count(0, 255), bit_count(-7, 7), bit_count(-8, 7)
        (8, 4, 4)
    """
    return (qmax - qmin).bit_length()


def shape(value: object, usual: torch.dtype | None = None) -> str:
    """The shape of a fake value, with its dtype where that is not the usual one."""
    if isinstance(value, Tensor):
        dtype = "" if value.dtype == usual else f" {str(value.dtype).removeprefix('torch.')}"
        return str(list(value.shape)) + dtype
    if isinstance(value, (list, tuple)):
        return "(" + ", ".join(shape(each, usual) for each in value) + ")"
    return type(value).__name__


def argument(value: fx.node.Argument, name: Callable[[fx.Node], str]) -> str:
    """One argument of a call, with nodes named by `name`."""
    if isinstance(value, fx.Node):
        return name(value)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(argument(each, name) for each in value) + "]"
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return repr(value)


def entry(found: object) -> str:
    """What a table entry says, in one phrase."""
    words = _PHRASES.get(type(found))
    return words(found) if words is not None else type(found).__name__


def _planned(found: Planned) -> str:
    return f"{found.spec or 'float'} (rule {found.rule})"


def _range(found: Range) -> str:
    return f"range {interval(found.low, found.high)}"


def _qparams(found: QParams) -> str:
    return f"scale {_spread(found.scale)}, codes {found.qmin}..{found.qmax}"


def _codes(found: Codes) -> str:
    bits = bit_count(found.qparams.qmin, found.qparams.qmax)
    return f"{bits} bit codes, scale {_spread(found.qparams.scale)}"


def _channel_scale(found: ChannelScale) -> str:
    return f"gamma {_spread(found.gamma)}"


def _layer_pair(found: LayerPair) -> str:
    into = f"into {found.producer}" if found.producer is not None else f"stays: {found.reason}"
    return f"one gamma for {len(found.readers)} reader{'s' * (len(found.readers) > 1)}, {into}"


def _skip_concat(found: SkipConcat) -> str:
    measured = not math.isnan(found.skip_variance)
    deep, skip = (f" (variance {number(v)})" * measured for v in (found.deep_variance, found.skip_variance))
    arms = [f"deep {found.deep}{deep}", f"skip {found.skip}{skip}"]
    return " + ".join(arms if found.skip_last else arms[::-1]) + ", uneven" * found.uneven


def _skip_arm(found: SkipArm) -> str:
    return f"{found.arm} arm of {found.concat}" + ", uneven" * found.uneven


def _shift(found: Shift) -> str:
    finer = int((found.exponent < found.largest).any(0).sum())
    finest = 2 ** (found.largest - int(found.exponent.min()))
    return f"{finer} of {found.exponent.shape[1]} channels have finer steps, down to 1/{finest}"


def _bias(found: Bias) -> str:
    return f"bias {_spread(found.value)}"


def _sensitivity(found: Sensitivity) -> str:
    metric = "" if found.metric is None else f", metric of {found.metric.shape[0]} channels"
    return f"felt {_spread(found.weight)} over {len(found.weight)} timestep groups{metric}"


def _spread(values: Tensor) -> str:
    low, high = number(values.min().item()), number(values.max().item())
    return low if low == high else f"{low}..{high}"


_PHRASES: Mapping[type, Callable[..., str]] = {
    Planned: _planned,
    Range: _range,
    QParams: _qparams,
    Codes: _codes,
    ChannelScale: _channel_scale,
    LayerPair: _layer_pair,
    SkipConcat: _skip_concat,
    SkipArm: _skip_arm,
    Shift: _shift,
    Bias: _bias,
    Sensitivity: _sensitivity,
}
