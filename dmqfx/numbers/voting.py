"""Voting on power-of-two steps: what each row prefers for each channel, counted; rows themselves are let go."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Ballot", "nearest_full", "step_errors"]


def step_errors(
    x: Tensor, scale: Tensor, zero_point: Tensor, codes: tuple[int, int], axis: int, largest: int
) -> Tensor:
    """Mean squared error of each channel of each row for the steps scale * 2^(j - largest), j = 0..largest.

    All steps have the same zero point, so a fine one reaches less far and clips.

    Shapes: x [B, ...] with C channels on `axis`, which is not dim 0; scale, zero_point [B]; `codes` the least
    and the greatest; returns float64 [B, C, largest + 1].
    """
    rows = x.movedim(axis, 1).reshape(x.shape[0], x.shape[axis], -1)
    zero = zero_point[:, None, None].to(rows)
    steps = rows / scale[:, None, None]  # in units of the coarsest step, where nothing overflows
    found = []
    for exponent in range(largest + 1):
        step = 2.0 ** (exponent - largest)
        nearest = (steps / step).round_().add_(zero).clamp_(*codes).sub_(zero).mul_(step)
        found.append(nearest.sub_(steps).square_().mean(2, dtype=torch.float64))
    return torch.stack(found, 2) * scale.double().square()[:, None, None]


class Ballot:
    """Votes and errors of every candidate step, per timestep group and channel.

    Of candidates as good as each other the coarsest wins: it is the one that clips least.

    Shapes: votes int64 and errors float64 [G, C, largest + 1].
    Example:
        >>> ballot = Ballot(1, 1, 1)
        >>> ballot.add(torch.tensor([[[0.1, 0.4]], [[0.1, 0.4]], [[9.0, 0.4]]]), torch.zeros(3, dtype=torch.long))
        >>> ballot.votes.tolist(), ballot.elected(agree=0.6).tolist(), ballot.elected(agree=0.7).tolist()
        ([[[2, 1]]], [[0]], [[1]])
    """

    def __init__(self, groups: int, channels: int, largest: int, device: torch.device | None = None) -> None:
        shape = (groups, channels, largest + 1)
        self.votes = torch.zeros(shape, dtype=torch.int64, device=device)
        self.errors = torch.zeros(shape, dtype=torch.float64, device=device)

    def add(self, errors: Tensor, group: Tensor) -> None:
        """Count rows.

        Shapes: errors [B, C, largest + 1]; group int64 [B].
        Raises: ValueError naming the first channel whose error is not finite.
        """
        bad = ~torch.isfinite(errors).all(2)
        if bool(bad.any()):
            row, channel = bad.nonzero()[0].tolist()
            raise ValueError(
                f"the error of channel {channel} is not finite in timestep group {int(group[row])}"
            )
        choice = F.one_hot(_coarsest_least(errors), errors.shape[2])
        self.votes.index_add_(0, group, choice)
        self.errors.index_add_(0, group, errors.double())

    def elected(self, agree: float) -> Tensor:
        """The favourite of each group's rows where a share of at least `agree` is for it, else the coarsest.

        Shapes: uint8 [G, C], the exponents 0..largest.
        """
        favourite = _coarsest_least(-self.votes)
        share = self.votes.amax(2).double() / self.votes.sum(2).clamp(min=1)
        return self._filled(torch.where(share >= agree, favourite, self.votes.shape[2] - 1))

    def least(self) -> Tensor:
        """The candidate with the least error over all rows of a group: no vote, no agreement needed.

        Shapes: uint8 [G, C].
        """
        return self._filled(_coarsest_least(self.errors))

    def joined(self, gather: Callable[[Tensor], Tensor]) -> Ballot:
        """One ballot of all processes; `gather` maps [1, ...] to [processes, ...]."""
        one = Ballot(self.votes.shape[0], self.votes.shape[1], self.votes.shape[2] - 1, self.votes.device)
        one.votes, one.errors = gather(self.votes[None]).sum(0), gather(self.errors[None]).sum(0)
        return one

    def pooled(self) -> Ballot:
        """One group of all rows."""
        one = Ballot(1, self.votes.shape[1], self.votes.shape[2] - 1, self.votes.device)
        one.votes, one.errors = self.votes.sum(0, keepdim=True), self.errors.sum(0, keepdim=True)
        return one

    def _filled(self, exponent: Tensor) -> Tensor:
        """A group without rows gets what the nearest group that has some got."""
        return exponent[nearest_full(self.votes[:, 0].sum(1))].to(torch.uint8)


def nearest_full(count: Tensor) -> Tensor:
    """For each group the nearest that has rows; of two as near the earlier.

    Shapes: count [G]; returns int64 [G].
    Example:
        >>> nearest_full(torch.tensor([0, 3, 0, 0, 5])).tolist()
        [1, 1, 1, 4, 4]
    """
    full = count.nonzero().flatten()
    distance = torch.arange(len(count), device=count.device)[:, None] - full
    return full[distance.abs().argmin(1)]


def _coarsest_least(values: Tensor) -> Tensor:
    """The index of the least value of the last dim, the last of several."""
    return values.shape[-1] - 1 - values.flip(-1).argmin(-1)
