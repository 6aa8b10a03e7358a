"""Integer codes of a weight that keep what the network's output feels of a layer, not the weight itself.

With X the layer's inputs, M the metric of its output and E = V - T what the codes V lack of a target T (the
weight, or what gives the wanted outputs best), they should make tr(M E X'X E') small. That quadratic is the
local problem of a layer; `gptq` and `adaround` are two ways to go about it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dmqfx.numbers.quant import QParams, QuantSpec
from dmqfx.numbers.ranges import search_range

__all__ = ["Grid", "Reconstruction", "Rounded", "damped", "ridge"]

_LEAST = 1e-6  # of damping


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """A layer's local problem.

    Shapes: given [N, K], the inputs as the layer will see them; wanted [N, O], the float layer's outputs
    without bias; weight [O, ...]; importance [N] of each row, or None; metric [O, O] of an error of the
    output, or None for all channels alike.
    Units: damping is relative to the mean energy of an input column (and of an output channel's metric);
    `asymmetric` is the share 0..1 of the way from the float weight to the one that best gives `wanted`; `norm` is
    the exponent of the search of the grid, see search_range. The grid is the target's, or the weight's own if it is
    `frozen`: codes beside the weight want that one. What the mean of the output lacks is left to a bias, if the
    problem is `centred`.
    """

    given: Tensor
    wanted: Tensor
    weight: Tensor
    spec: QuantSpec
    damping: float = 0.1
    asymmetric: float = 0.0
    importance: Tensor | None = None
    metric: Tensor | None = None
    norm: float = 2.0
    centred: bool = True
    frozen: bool = False

    @cached_property
    def target(self) -> Tensor:
        """The weight that the codes should stand for, float64 [O, K]."""
        target = self.weight.flatten(1).double()
        if not self.asymmetric:
            return target
        x, y = self._centred
        lacking = x.T @ y - x.T @ x @ target.T
        best: Tensor = target + self.asymmetric * torch.linalg.solve(self.gram, lacking).T
        return best

    @cached_property
    def gram(self) -> Tensor:
        """X'X of the centred inputs by the rows' shares, damped, float64 [K, K]."""
        x, _ = self._centred
        return damped(x.T @ x, self.damping)

    @cached_property
    def felt(self) -> Tensor | None:
        """The metric, damped, float64 [O, O]; None for all channels alike."""
        return None if self.metric is None else damped(self.metric.double(), self.damping)

    @cached_property
    def params(self) -> QParams:
        """The searched range of the target, or of the weight."""
        covered = self.weight if self.frozen else self.target.to(self.weight.dtype).view_as(self.weight)
        return search_range(covered, self.spec, norm=self.norm)

    @cached_property
    def grid(self) -> Grid:
        """The same as a matrix needs it."""
        return Grid.of(self.params, len(self.weight))

    @property
    def nearest(self) -> Tensor:
        """The codes nearest to the weight, float64 [O, K]."""
        return self.grid.exact(self.weight.flatten(1).double()).round()

    def loss(self, codes: Tensor) -> float:
        """The energy of the output's error, in the metric.

        Shapes: codes float64 [O, K].
        """
        error = self.grid.real(codes) - self.target
        felt = error if self.felt is None else self.felt @ error
        return float((felt * (error @ self.gram)).sum())

    def rounded(self, codes: Tensor) -> Rounded:
        """The result with these codes [O, K]; the means, which codes do not see, are left to the offset."""
        mean_x, mean_y = self._means
        return Rounded.of(codes, self.weight.shape, self.params, mean_y - self.grid.real(codes) @ mean_x)

    @cached_property
    def share(self) -> Tensor:
        """Each row's share of the mean [N]; they add up to 1."""
        if self.importance is None or not bool((self.importance > 0).any()):
            return self.given.new_full((len(self.given),), 1 / len(self.given), dtype=torch.float64)
        weight = self.importance.double()
        return weight / weight.sum()

    @cached_property
    def _means(self) -> tuple[Tensor, Tensor]:
        means = self.share @ self.given.double(), self.share @ self.wanted.double()
        return means if self.centred else (torch.zeros_like(means[0]), torch.zeros_like(means[1]))

    @property
    def _centred(self) -> tuple[Tensor, Tensor]:
        """Inputs and outputs without their means, times the root of the share."""
        (mean_x, mean_y), root = self._means, self.share.sqrt()[:, None]
        x, y = (each.to(torch.float64, copy=True) for each in (self.given, self.wanted))
        return x.sub_(mean_x).mul_(root), y.sub_(mean_y).mul_(root)


@dataclass(frozen=True, eq=False)
class Rounded:
    """Codes [O, ...] with their parameters, and what the layer's output lacks in the mean [O]."""

    codes: Tensor
    params: QParams
    offset: Tensor

    @staticmethod
    def of(codes: Tensor, shape: Sequence[int], params: QParams, offset: Tensor) -> Rounded:
        """From codes [O, K] of a weight of that shape, in the smallest dtype that holds them."""
        return Rounded(codes.to(torch.int8 if params.qmin < 0 else torch.uint8).view(shape), params, offset)


@dataclass(frozen=True, eq=False)
class Grid:
    """Scales and zero points [O] in float64, and the range of codes."""

    scale: Tensor
    zero_point: Tensor
    qmin: int
    qmax: int

    @staticmethod
    def of(params: QParams, rows: int) -> Grid:
        """That of a weight's parameters, which may be one set for all of its rows."""
        scale, zero_point = (each.double()[0].expand(rows) for each in (params.scale, params.zero_point))
        return Grid(scale, zero_point, params.qmin, params.qmax)

    def rows(self, index: Tensor | slice) -> Grid:
        """That of some rows."""
        return Grid(self.scale[index], self.zero_point[index], self.qmin, self.qmax)

    def nearest(self, column: Tensor) -> Tensor:
        """The codes of one number for each row."""
        return (torch.round(column / self.scale) + self.zero_point).clamp(self.qmin, self.qmax)

    def exact(self, weight: Tensor) -> Tensor:
        """Where a weight [O, K] lies between the codes, none beyond the last."""
        exact = weight / self.scale[:, None] + self.zero_point[:, None]
        return exact.clamp(self.qmin, self.qmax)

    def real(self, codes: Tensor) -> Tensor:
        """What codes [O, K] stand for."""
        return (codes - self.zero_point[:, None]) * self.scale[:, None]


def damped(gram: Tensor, damping: float) -> Tensor:
    """The matrix with damping times its mean diagonal added to the diagonal; the identity if it is all 0."""
    return gram + torch.eye(len(gram)).to(gram) * ridge(damping, float(gram.diagonal().mean()))


def ridge(damping: float, mean: float) -> float:
    """What damping adds to a diagonal of that mean: a millionth of it at least, so that there is an inverse."""
    return max(damping, _LEAST) * mean if mean > 0 else 1.0
