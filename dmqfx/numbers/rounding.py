"""Integer codes of a weight that keep a layer's output, not the weight, near what it was."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dmqfx.numbers.quant import QParams, QuantSpec
from dmqfx.numbers.ranges import search_range

__all__ = ["Reconstruction", "Rounded", "reconstruct"]


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """A layer's local problem: codes of the weight such that given @ weight' is near wanted.

    Shapes: given [N, K], as the layer will see it; wanted [N, O], as the float layer gives it; weight [O, ...].
    Units: damping is relative to the mean energy of an input column.
    """

    given: Tensor
    wanted: Tensor
    weight: Tensor
    spec: QuantSpec
    damping: float


@dataclass(frozen=True, eq=False)
class Rounded:
    """Codes [O, ...] with their parameters, and what the layer's output lacks in the mean [O]."""

    codes: Tensor
    params: QParams
    offset: Tensor


def reconstruct(problem: Reconstruction) -> Rounded:
    """The weight that solves the problem in floats, then codes that keep its output (GPTQ).

    Means are left to the offset: the codes see centred columns only.
    """
    x, y = problem.given.double(), problem.wanted.double()
    mean_x, mean_y = x.mean(0), y.mean(0)
    centred = x - mean_x
    normal = Normal(centred.T @ centred, centred.T @ (y - mean_y))
    flat = problem.weight.flatten(1).double()
    target = least_squares(normal, flat, problem.damping)
    params = search_range(target.to(problem.weight.dtype).view_as(problem.weight), problem.spec)
    scale, zero = (value.T.double().expand(len(flat), 1) for value in (params.scale, params.zero_point))
    codes = gptq(target, normal.gram, scale, zero, params.qmin, params.qmax, problem.damping)
    offset = mean_y - ((codes - zero) * scale) @ mean_x
    dtype = torch.int8 if params.qmin < 0 else torch.uint8
    return Rounded(codes.to(dtype).view(problem.weight.shape), params, offset)


@dataclass(frozen=True, eq=False)
class Normal:
    """The normal equations of a layer's local problem, min over V of |X V' - Y|^2.

    Shapes: gram [K, K] = X'X; cross [K, O] = X'Y.
    """

    gram: Tensor
    cross: Tensor


def least_squares(problem: Normal, weight: Tensor, damping: float) -> Tensor:
    """The float weight that solves the problem, pulled to `weight` by damping times the mean diagonal.

    Shapes: weight, result [O, K].
    """
    gram = problem.gram
    ridge = damping * _energy(gram)
    damped = gram + ridge * torch.eye(len(gram), dtype=gram.dtype)
    residual = problem.cross - gram @ weight.T.to(gram)
    correction: Tensor = torch.linalg.solve(damped, residual)
    return weight + correction.T.to(weight)


def _energy(gram: Tensor) -> Tensor:
    """The mean energy of an input column; 1 where no column varies, which any ridge serves."""
    mean = gram.diagonal().mean()
    return mean.where(mean > 0, torch.ones_like(mean))


def gptq(
    target: Tensor, gram: Tensor, scale: Tensor, zero: Tensor, qmin: int, qmax: int, damping: float
) -> Tensor:
    """Codes column by column, each column's error passed on to the columns not yet rounded.

    Shapes: target [O, K]; gram [K, K]; scale, zero [O, 1]; returns codes as floats [O, K].
    Source: GPTQ (arXiv 2210.17323), algorithm 1, in the order of falling diagonal.
    """
    order = gram.diagonal().argsort(descending=True)
    w = target.to(gram)[:, order].clone()
    h = gram[order][:, order]
    ridge = damping * _energy(h)
    h = h + ridge * torch.eye(len(h), dtype=h.dtype)
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    scale, zero = scale.to(w)[:, 0], zero.to(w)[:, 0]
    codes = torch.empty_like(w)
    block = 128
    for start in range(0, w.shape[1], block):
        end = min(start + block, w.shape[1])
        errors = torch.zeros(len(w), end - start, dtype=w.dtype)
        for k in range(start, end):
            column = w[:, k]
            q = (torch.round(column / scale) + zero).clamp(qmin, qmax)
            codes[:, k] = q
            error = (column - (q - zero) * scale) / upper[k, k]
            w[:, k + 1 : end] -= error[:, None] * upper[k, k + 1 : end]
            errors[:, k - start] = error
        w[:, end:] -= errors @ upper[start:end, end:]
    return codes[:, order.argsort()]


def descend(
    codes: Tensor,
    target: Tensor,
    gram: Tensor,
    scale: Tensor,
    zero: Tensor,
    qmin: int,
    qmax: int,
    sweeps: int,
    damping: float,
) -> Tensor:
    """Coordinate descent on the codes: each column set to its best value given the others, several times.

    Shapes: as for gptq; target is the float optimum.
    """
    order = gram.diagonal().argsort(descending=True)
    ridge = damping * gram.diagonal().mean().clamp(min=torch.finfo(gram.dtype).tiny)
    h = (gram + ridge * torch.eye(len(gram), dtype=gram.dtype))[order][:, order]
    s, z = scale.to(h), zero.to(h)
    c = codes.to(h)[:, order].clone()
    t = target.to(h)[:, order]
    diagonal = h.diagonal()
    block = 128
    for _ in range(sweeps):
        before = c.clone()
        gradient = (t - (c - z) * s) @ h  # [O, K]
        for start in range(0, h.shape[1], block):
            end = min(start + block, h.shape[1])
            local = gradient[:, start:end].clone()
            delta = torch.zeros_like(local)
            for k in range(start, end):
                old = c[:, k]
                want = (old - z[:, 0]) * s[:, 0] + local[:, k - start] / diagonal[k]
                new = (torch.round(want / s[:, 0]) + z[:, 0]).clamp(qmin, qmax)
                move = (new - old) * s[:, 0]
                c[:, k] = new
                delta[:, k - start] = move
                local -= move[:, None] * h[k, start:end]
            gradient -= delta @ h[start:end]
        if torch.equal(before, c):
            break
    return c[:, order.argsort()]
