"""Integer codes of a weight that keep what the network's output feels of a layer, not the weight itself.

With X the layer's inputs, M the metric of its output and E = V - W the change of the weight, the codes V
make tr(M E X'X E') small. Both factors are minded by handing an error on: the error of a column to the
columns not yet rounded (X'X), the error of a block of rows to the rows not yet rounded (M).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dmqfx.numbers.quant import QParams, QuantSpec
from dmqfx.numbers.ranges import search_range

__all__ = [
    "COLUMNS",
    "ROW_BLOCKS",
    "Reconstruction",
    "Rounded",
    "RowGrid",
    "by_columns",
    "damped",
    "elimination",
    "reconstruct",
]

COLUMNS = 128  # columns whose errors are handed on together: a matrix product instead of many vector ones
ROW_BLOCKS = 8  # blocks of rows: more follow the metric closer and take longer, for a gain that levels off


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """A layer's local problem.

    Shapes: given [N, K], the inputs as the layer will see them; wanted [N, O], the float layer's outputs
    without bias; weight [O, ...]; importance [N] of each row, or None; metric [O, O] of an error of the
    output, or None for all channels alike.
    Units: damping is relative to the mean energy of an input column (and of an output channel's metric);
    `asymmetric` is the share 0..1 of the way from the float weight to the one that best gives `wanted`.
    """

    given: Tensor
    wanted: Tensor
    weight: Tensor
    spec: QuantSpec
    damping: float = 0.1
    asymmetric: float = 0.0
    importance: Tensor | None = None
    metric: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Rounded:
    """Codes [O, ...] with their parameters, and what the layer's output lacks in the mean [O]."""

    codes: Tensor
    params: QParams
    offset: Tensor


def reconstruct(problem: Reconstruction) -> Rounded:
    """Codes of the weight; means are left to the offset, the codes see centred columns only.

    Source: GPTQ (arXiv 2210.17323) for the columns; its elimination once more, by blocks, for the rows.
    """
    x, y = problem.given.double(), problem.wanted.double()
    share = _shares(problem)
    mean_x, mean_y = share @ x, share @ y
    scaled = (x - mean_x) * share.sqrt()[:, None]
    gram = damped(scaled.T @ scaled, problem.damping)
    target = problem.weight.flatten(1).double()
    if problem.asymmetric:
        lacking = scaled.T @ ((y - mean_y) * share.sqrt()[:, None]) - scaled.T @ scaled @ target.T
        target = target + problem.asymmetric * torch.linalg.solve(gram, lacking).T
    params = search_range(target.to(problem.weight.dtype).view_as(problem.weight), problem.spec)
    grid = RowGrid.of(params, len(target))
    codes = _by_rows(target, gram, grid, problem)
    offset = mean_y - grid.real(codes) @ mean_x
    dtype = torch.int8 if params.qmin < 0 else torch.uint8
    return Rounded(codes.to(dtype).view(problem.weight.shape), params, offset)


@dataclass(frozen=True, eq=False)
class RowGrid:
    """Scales and zero points [O] in float64, and the range of codes."""

    scale: Tensor
    zero_point: Tensor
    qmin: int
    qmax: int

    @staticmethod
    def of(params: QParams, rows: int) -> RowGrid:
        scale, zero_point = (each.double()[0].expand(rows) for each in (params.scale, params.zero_point))
        return RowGrid(scale, zero_point, params.qmin, params.qmax)

    def rows(self, index: Tensor | slice) -> RowGrid:
        return RowGrid(self.scale[index], self.zero_point[index], self.qmin, self.qmax)

    def nearest(self, column: Tensor) -> Tensor:
        return (torch.round(column / self.scale) + self.zero_point).clamp(self.qmin, self.qmax)

    def real(self, codes: Tensor) -> Tensor:
        return (codes - self.zero_point[:, None]) * self.scale[:, None]


def _shares(problem: Reconstruction) -> Tensor:
    """Each row's share of the mean [N]; they add up to 1."""
    if problem.importance is None or not bool((problem.importance > 0).any()):
        return problem.given.new_full((len(problem.given),), 1 / len(problem.given), dtype=torch.float64)
    weight = problem.importance.double()
    return weight / weight.sum()


def damped(gram: Tensor, damping: float) -> Tensor:
    """The matrix with damping times its mean diagonal added to the diagonal; the identity if it is all 0."""
    ridge = damping * gram.diagonal().mean()
    return gram + torch.eye(len(gram), dtype=gram.dtype, device=gram.device) * (
        ridge if float(ridge) > 0 else 1.0
    )


def elimination(gram: Tensor) -> Tensor:
    """Upper triangular U with U'U the inverse: what rounding one variable does to those after it."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor


def _by_rows(target: Tensor, gram: Tensor, grid: RowGrid, problem: Reconstruction) -> Tensor:
    """Codes [O, K], block of rows by block of rows where there is a metric."""
    by_energy = gram.diagonal().argsort(descending=True)
    columns = elimination(gram[by_energy][:, by_energy])
    if problem.metric is None:
        return by_columns(target[:, by_energy], columns, grid)[:, by_energy.argsort()]
    metric = damped(problem.metric.double(), problem.damping)
    order = metric.diagonal().argsort(descending=True)
    rows, left = elimination(metric[order][:, order]), target[order][:, by_energy]
    codes, height = torch.empty_like(left), -(-len(order) // ROW_BLOCKS)
    for start in range(0, len(order), height):
        block, rest = slice(start, start + height), slice(start + height, None)
        part = grid.rows(order[block])
        codes[block] = by_columns(left[block], columns, part)
        change = part.real(codes[block]) - left[block]
        handed = torch.linalg.solve_triangular(rows[block, block].T, change, upper=False)
        left[rest] += rows[block, rest].T @ handed
    return codes[order.argsort()][:, by_energy.argsort()]


def by_columns(target: Tensor, factor: Tensor, grid: RowGrid) -> Tensor:
    """Codes [R, K] of some rows, column by column in the given order."""
    left, codes = target.clone(), torch.empty_like(target)
    for start in range(0, left.shape[1], COLUMNS):
        end = min(start + COLUMNS, left.shape[1])
        block, local = left[:, start:end], factor[start:end, start:end]
        errors = torch.empty_like(block)
        for k in range(end - start):
            column = block[:, k]
            codes[:, start + k] = code = grid.nearest(column)
            errors[:, k] = error = (column - (code - grid.zero_point) * grid.scale) / local[k, k]
            block[:, k + 1 :] -= torch.outer(error, local[k, k + 1 :])
        left[:, end:] -= errors @ factor[start:end, end:]
    return codes
