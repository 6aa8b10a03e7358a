"""Codes by handing errors on: of a column to the columns not yet rounded (X'X), of a block of rows to the rows
not yet rounded (M).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmqfx.numbers.rounding import Grid, Reconstruction

__all__ = ["COLUMNS", "ROW_BLOCKS", "by_columns", "elimination", "handed_on"]

COLUMNS = 128  # columns whose errors are handed on together: a matrix product instead of many vector ones
ROW_BLOCKS = 8  # blocks of rows: more follow the metric closer and take longer, for a gain that levels off


def handed_on(problem: Reconstruction) -> Tensor:
    """Codes float64 [O, K], block of rows by block of rows where there is a metric.

    Source: GPTQ (arXiv 2210.17323) for the columns; its elimination once more, by blocks, for the rows.
    """
    target, gram, grid = problem.target, problem.gram, problem.grid
    by_energy = gram.diagonal().argsort(descending=True)
    columns = elimination(gram[by_energy][:, by_energy])
    if problem.felt is None:
        return by_columns(target[:, by_energy], columns, grid)[:, by_energy.argsort()]
    order = problem.felt.diagonal().argsort(descending=True)
    rows, left = elimination(problem.felt[order][:, order]), target[order][:, by_energy]
    codes, height = torch.empty_like(left), -(-len(order) // ROW_BLOCKS)
    for start in range(0, len(order), height):
        block, rest = slice(start, start + height), slice(start + height, None)
        part = grid.rows(order[block])
        codes[block] = by_columns(left[block], columns, part)
        change = part.real(codes[block]) - left[block]
        handed = torch.linalg.solve_triangular(rows[block, block].T, change, upper=False)
        left[rest] += rows[block, rest].T @ handed
    return codes[order.argsort()][:, by_energy.argsort()]


def elimination(gram: Tensor) -> Tensor:
    """Upper triangular U with U'U the inverse: what rounding one variable does to those after it."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor


def by_columns(target: Tensor, factor: Tensor, grid: Grid) -> Tensor:
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
