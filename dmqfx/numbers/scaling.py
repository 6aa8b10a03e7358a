"""Equivalent scales: how a factor per input channel meets a weight."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

__all__ = ["column_factor"]


def column_factor(shape: Sequence[int], gamma: Tensor) -> Tensor:
    """gamma, laid out so that W * factor scales the columns of each input channel.

    Shapes: shape of the weight [O, C / groups, ...]; gamma [C]; result [1 or O, C / groups, 1, ...].
    """
    rows, per_group = shape[0], shape[1]
    groups = gamma.numel() // per_group
    factor = gamma.view(groups, 1, per_group)
    factor = factor if groups == 1 else factor.expand(-1, rows // groups, -1)
    return factor.reshape(-1, per_group, *[1] * (len(shape) - 2))
