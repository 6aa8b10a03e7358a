"""Codes by learning: every weight moves between two neighbouring codes until it has settled on one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from dmqfx.numbers.rounding import Grid, Reconstruction

__all__ = ["Annealing", "Cells", "Loss", "annealed", "rectified", "unsettled"]

Loss: TypeAlias = Literal["relative", "absolute"]

_GAMMA, _ZETA = -0.1, 1.1  # the sigmoid is stretched over the ends of 0..1, so that it can reach them
_LEAN = 0.1  # how far towards the weight learning begins, seen from a code that is not the nearest one


@dataclass(frozen=True)
class Annealing:
    """How rounding is learned.

    Units: `rate` is Adam's; `settling` weighs the regulariser, 1 - |2h - 1|^beta of each weight, against the
    loss, which counts as 1 per weight where rounding errors are independent and uniform. It is off for the
    share `warmup` of the iterations; then beta goes linearly from the first to the last. With an `absolute` loss it is
    weighed against the squared error itself, summed over channels in the mean over positions (in blocks, which know
    their tokens, over tokens in the mean over channels where there are tokens), as published.
    Example:
        >>> how = Annealing(iterations=10, warmup=0.5, beta_start=20, beta_end=2)
        >>> [how.beta(k) for k in (0, 4, 5, 9)]
        [None, None, 20.0, 2.0]
    """

    iterations: int = 1000
    warmup: float = 0.2
    beta_start: float = 20.0
    beta_end: float = 2.0
    settling: float = 30.0
    rate: float = 0.03
    loss: Loss = "relative"

    def beta(self, iteration: int) -> float | None:
        """The exponent of the regulariser, or None before it begins."""
        begun = round(self.warmup * self.iterations)
        if iteration < begun:
            return None
        share = (iteration - begun) / max(1, self.iterations - begun - 1)
        return self.beta_start + share * (self.beta_end - self.beta_start)


def annealed(problem: Reconstruction, start: Tensor, how: Annealing) -> Tensor:
    """The learned codes, or those of the start where learning ends with a greater loss.

    A code is the start's, or its neighbour on the side of the weight: started from the nearest ones, the codes
    are the two beside the weight. What the range clips stays where it is. The gradient is that of all rows at
    once, in closed form: the loss is a quadratic in the weight.

    Shapes: start, result float64 [O, K].
    Source: AdaRound (arXiv 2004.10568); the rectified sigmoid, the regulariser and its schedule are the paper's.
    """
    cells = Cells.of(problem.grid, problem.weight, start)
    alpha = cells.alpha
    pull, adam = _Pull(problem, cells, how.loss), torch.optim.Adam([alpha], lr=how.rate, foreach=False)
    for iteration in range(how.iterations):
        sigmoid = torch.sigmoid(alpha)
        stretched = sigmoid * (_ZETA - _GAMMA) + _GAMMA
        h = stretched.clamp(0, 1)
        slope = pull(h)
        if (beta := how.beta(iteration)) is not None:
            side = 2 * h - 1
            slope -= how.settling * 2 * beta * side.sign() * side.abs().pow(beta - 1)
        inside = cells.movable & (stretched > 0) & (stretched < 1)
        alpha.grad = slope * (_ZETA - _GAMMA) * sigmoid * (1 - sigmoid) * inside
        adam.step()
    learned = cells.settled(alpha)
    return learned if problem.loss(learned) < problem.loss(start) else start


@dataclass(frozen=True, eq=False)
class Cells:
    """The two codes between which each weight is: `lower`, and one more; where in between it begins, 0..1.

    One of the two is the start; the other lies on the side of the weight.

    Shapes: all [O, K].
    """

    start: Tensor
    lower: Tensor
    begin: Tensor
    movable: Tensor

    @staticmethod
    def of(grid: Grid, weight: Tensor, start: Tensor) -> Cells:
        """Those of a weight [O, ...] whose codes are `start`, float64 [O, K]."""
        exact = grid.exact(weight.flatten(1).double())
        lower = torch.where(exact >= start, start, start - 1).clamp(grid.qmin, grid.qmax - 1)
        place, corner = (exact - lower).clamp(0, 1), start - lower
        begin = corner + (1.0 if bool((place - corner).abs().max() <= 0.5) else _LEAN) * (place - corner)
        movable = (exact > grid.qmin) & (exact < grid.qmax)
        return Cells(start, lower, torch.where(movable, begin, corner), movable)

    @property
    def alpha(self) -> Tensor:
        """What learning begins with, float32 [O, K]: the rectified sigmoid of it is `begin`."""
        return -torch.log((_ZETA - _GAMMA) / (self.begin - _GAMMA) - 1).float()

    def settled(self, alpha: Tensor) -> Tensor:
        """The codes that alpha has come to, float64 [O, K]."""
        return torch.where(self.movable, self.lower + (alpha >= 0), self.start)


def rectified(alpha: Tensor) -> Tensor:
    """h(alpha): a sigmoid that reaches 0 and 1."""
    return (torch.sigmoid(alpha) * (_ZETA - _GAMMA) + _GAMMA).clamp(0, 1)


def unsettled(h: Tensor, beta: float) -> Tensor:
    """The regulariser: 1 for a weight half way between two codes, 0 for one on a code."""
    return 1 - (2 * h - 1).abs().pow(beta)


class _Pull:
    """The slope of the loss in every h; a relative one's unit is the loss, by weight, of independent uniform errors.

    An absolute one is in units of the output, whatever that feels: a metric is brought to a mean diagonal of 1.

    In single precision: what Adam makes of a slope does not depend on its last digits.
    """

    def __init__(self, problem: Reconstruction, cells: Cells, loss: Loss) -> None:
        grid, gram, felt = problem.grid, problem.gram, problem.felt
        each = grid.scale.square() / 12 * (1.0 if felt is None else felt.diagonal())
        expected = float(each.sum() * gram.diagonal().sum()) / cells.lower.numel()
        felt_alone = 1.0 if felt is None else float(felt.diagonal().mean()) or 1.0
        unit = expected if loss == "relative" else felt_alone
        self._off = (grid.real(cells.lower) - problem.target).float()
        self._scale, self._gram = grid.scale.float()[:, None], gram.float()
        left = grid.scale[:, None] if felt is None else grid.scale[:, None] * felt
        self._felt = (2 * left / unit).float()

    def __call__(self, h: Tensor) -> Tensor:
        """Shapes: h, result float32 [O, K]."""
        error = self._off + h * self._scale
        pulled = error @ self._gram
        return self._felt * pulled if self._felt.shape[1] == 1 < len(self._felt) else self._felt @ pulled
