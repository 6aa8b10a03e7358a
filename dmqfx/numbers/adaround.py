"""Codes by learning: every weight moves between two neighbouring codes until it has settled on one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dmqfx.numbers.rounding import Reconstruction

__all__ = ["Annealing", "annealed"]

_GAMMA, _ZETA = -0.1, 1.1  # the sigmoid is stretched over the ends of 0..1, so that it can reach them
_LEAN = 0.1  # how far towards the weight learning begins, seen from a code that is not the nearest one


@dataclass(frozen=True)
class Annealing:
    """How rounding is learned.

    Units: `rate` is Adam's; `settling` weighs the regulariser, 1 - |2h - 1|^beta of each weight, against the
    loss, which counts as 1 per weight where rounding errors are independent and uniform. It is off for the
    share `warmup` of the iterations; then beta goes linearly from the first to the last.
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
    cells = _Cells.of(problem, start)
    alpha = _inverse_sigmoid(cells.begin).float()
    pull, adam = _Pull(problem, cells), torch.optim.Adam([alpha], lr=how.rate, foreach=False)
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
    learned = torch.where(cells.movable, cells.lower + (alpha >= 0), start)
    return learned if problem.loss(learned) < problem.loss(start) else start


@dataclass(frozen=True, eq=False)
class _Cells:
    """The two codes between which each weight is: `lower`, and one more; where in between it begins, 0..1.

    Shapes: all [O, K].
    """

    lower: Tensor
    begin: Tensor
    movable: Tensor

    @staticmethod
    def of(problem: Reconstruction, start: Tensor) -> _Cells:
        grid, weight = problem.grid, problem.weight.flatten(1).double()
        exact = grid.exact(weight)
        lower = torch.where(exact >= start, start, start - 1).clamp(grid.qmin, grid.qmax - 1)
        place, corner = (exact - lower).clamp(0, 1), start - lower
        begin = corner + (1.0 if bool((place - corner).abs().max() <= 0.5) else _LEAN) * (place - corner)
        movable = (exact > grid.qmin) & (exact < grid.qmax)
        return _Cells(lower, torch.where(movable, begin, corner), movable)


class _Pull:
    """The slope of the loss in every h; its unit is the loss, by weight, of independent uniform errors.

    In single precision: what Adam makes of a slope does not depend on its last digits.
    """

    def __init__(self, problem: Reconstruction, cells: _Cells) -> None:
        grid, gram, felt = problem.grid, problem.gram, problem.felt
        each = grid.scale.square() / 12 * (1.0 if felt is None else felt.diagonal())
        unit = float(each.sum() * gram.diagonal().sum()) / cells.lower.numel()
        self._off = (grid.real(cells.lower) - problem.target).float()
        self._scale, self._gram = grid.scale.float()[:, None], gram.float()
        left = torch.diag(grid.scale) if felt is None else grid.scale[:, None] * felt
        self._felt = (2 * left / unit).float()

    def __call__(self, h: Tensor) -> Tensor:
        """Shapes: h, result float32 [O, K]."""
        error = self._off + h * self._scale
        return self._felt @ (error @ self._gram)


def _inverse_sigmoid(h: Tensor) -> Tensor:
    """alpha with sigmoid(alpha) stretched = h."""
    return -torch.log((_ZETA - _GAMMA) / (h - _GAMMA) - 1)
