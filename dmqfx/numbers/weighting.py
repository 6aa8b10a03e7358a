"""How much each timestep's rows weigh in what is learned."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

__all__ = ["UNEVEN", "TimestepWeights", "Weighting"]

Weighting = Literal["uniform", "linear", "quadratic", "adaptive", "focal", "published"]
UNEVEN = ("linear", "quadratic", "adaptive", "focal", "published")
"""Those in which timesteps count differently."""


class TimestepWeights:
    """Weights of the rows of each mini-batch, by their timestep group; group 0 holds the least timesteps.

    `adaptive` is a focal weight (1 - share)^strength, where share is a group's part of all groups' average
    losses: the groups of small loss decide. The averages are exponential, of each group's mean loss, updated
    where the group is present; weights are 1 in the mean of a batch. `focal` is the same without that: weights as
    they are, 1 at most. `published` is `focal` by averages of each group's *sum*, in which absent groups decay, as in
    DMQ. `linear` and `quadratic` fall from 1 + strength at the noisiest group to 1 + strength / groups, or / groups^2. As
    long as no two groups have a loss, all other weights are 1.

    Source: DMQ (arXiv 2507.12933), adaptive timestep weighting.
    Example:
        >>> weights = TimestepWeights("adaptive", groups=2, strength=1.0, momentum=0.0)
        >>> weights(torch.tensor([3.0, 1.0]), torch.tensor([0, 1]))
        tensor([0.5000, 1.5000])
    """

    def __init__(self, kind: Weighting, groups: int, strength: float = 20.0, momentum: float = 0.95) -> None:
        self.kind, self.groups, self.strength, self.momentum = kind, groups, strength, momentum
        self.average = torch.zeros(groups, dtype=torch.float64)
        self._known = torch.zeros(groups, dtype=torch.bool)

    def __call__(self, losses: Tensor, group: Tensor) -> Tensor:
        """The weights of a batch, once its losses have been counted.

        Shapes: losses [B] of single rows; group int64 [B]; returns [B].
        """
        if self.kind == "uniform" or self.groups == 1:
            return torch.ones_like(losses)
        if self.kind in ("linear", "quadratic"):
            early = (group + 1).to(losses) / self.groups
            return 1 + self.strength * early ** (1 if self.kind == "linear" else 2)
        self._count(losses.detach().double().cpu(), group.cpu())
        if int((self.average > 0).sum()) < 2:
            return torch.ones_like(losses)  # of one group nothing is early
        total = self.average.sum()
        found = ((1 - self.average / total) ** self.strength)[group.cpu()]
        if self.kind == "adaptive":
            found = found / found.mean().clamp(min=torch.finfo(torch.float64).tiny)
        return found.to(losses)

    def _count(self, losses: Tensor, group: Tensor) -> None:
        sums = torch.zeros(self.groups, dtype=torch.float64).index_add_(0, group, losses)
        count = torch.bincount(group, minlength=self.groups)
        if self.kind == "published":
            self.average = self.momentum * self.average + (1 - self.momentum) * sums
            return
        present, means = count > 0, sums / count.clamp(min=1)
        moved = self.momentum * self.average + (1 - self.momentum) * means
        self.average = torch.where(present, torch.where(self._known, moved, means), self.average)
        self._known |= present
