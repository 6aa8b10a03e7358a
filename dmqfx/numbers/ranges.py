"""Which range of a weight its codes should cover: all of it, or the part that gives the least error."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dmqfx.errors import CalibrationError
from dmqfx.numbers.quant import QParams, QuantSpec, params_from_range

__all__ = ["search_range"]

_BLOCK = 2**17  # elements worked on at a time: three such float32 arrays stay in the caches of two cores
_CANDIDATES_PER_LOOK = 8  # how often to ask whether a smaller range can still win


def search_range(weight: Tensor, spec: QuantSpec, *, norm: float = 2.0, candidates: int = 80) -> QParams:
    """Parameters of a weight, from its extremes or (`range="mse"`) from the best of many smaller ranges.

    Candidate i covers 1 - 0.8 i / candidates of the full range; the least sum of |rounded - w|^norm wins, the
    larger range on a tie. The zero point is that of the full range, since both ends shrink by one factor.

    Shapes: weight [O, ...]; one scale for each of its O rows, or one in all if the spec is per tensor.
    Raises: CalibrationError that names the first output channel with a value that is not finite.
    Source: the search of LAPQ as Q-Diffusion, TFMQ-DM and DMQ use it (norm 2.4), with 0 always on the grid.
    """
    rows = weight.detach().reshape(weight.shape[0], -1)
    low, high = rows.amin(1), rows.amax(1)
    _check_finite(low, high)
    widest = params_from_range(low[None], high[None], spec, 0)
    if spec.range == "minmax":
        return widest
    if spec.per == "tensor":
        rows = rows.reshape(1, -1)
    factors = 1 - 0.8 * torch.arange(candidates, dtype=widest.scale.dtype, device=rows.device) / candidates
    best = torch.cat([chunk.search(factors) for chunk in _chunks(rows, widest, norm)])
    return replace(widest, scale=(widest.scale * best).clamp(min=torch.finfo(best.dtype).tiny))


@dataclass(frozen=True, eq=False)
class _Chunk:
    """A few output channels and the parameters of their full range.

    Shapes: blocks hold columns [c, k] of the weight with two buffers of that shape to work in; scale [c, 1];
    zero_point [c, 1], or None if all are 0.
    """

    blocks: Sequence[tuple[Tensor, Tensor, Tensor]]
    scale: Tensor
    zero_point: Tensor | None
    qmin: int
    qmax: int
    norm: float

    def search(self, factors: Tensor) -> Tensor:
        """The factor [c] of the full range with the least error for each row; factors descend from 1.

        What a range clips is a lower bound on the error of every smaller range, so the search ends where the
        clipped part alone exceeds the best error of every row: the result is that of trying all factors.
        """
        inverses = (self.scale * factors[:, None, None]).reciprocal().unbind()
        errors: list[Tensor] = []
        for count, inverse in enumerate(inverses, start=1):
            errors.append(self._error(inverse))
            if count % _CANDIDATES_PER_LOOK == 0:
                least = (torch.stack(errors) * factors[:count, None]).amin(0)
                if bool((self._clipped(inverse) * factors[count - 1] >= least).all()):
                    break
        return factors[(torch.stack(errors) * factors[: len(errors), None]).argmin(0)]

    def _error(self, inverse: Tensor) -> Tensor:
        """Norm [c] of what rounding changes, in steps."""
        norms = []
        for block, real, nearest in self.blocks:
            self._steps(block, inverse, real)
            torch.round(real, out=nearest).clamp_(self.qmin, self.qmax).sub_(real)
            norms.append(torch.linalg.vector_norm(nearest, self.norm, 1))
        return _join(norms, self.norm)

    def _clipped(self, inverse: Tensor) -> Tensor:
        """Norm [c] of what lies outside the codes' range, in steps."""
        norms = []
        for block, real, nearest in self.blocks:
            self._steps(block, inverse, real)
            torch.clamp(real, self.qmin, self.qmax, out=nearest).sub_(real)
            norms.append(torch.linalg.vector_norm(nearest, self.norm, 1))
        return _join(norms, self.norm)

    def _steps(self, block: Tensor, inverse: Tensor, real: Tensor) -> None:
        torch.mul(block, inverse, out=real)
        if self.zero_point is not None:
            real.add_(self.zero_point)


def _chunks(rows: Tensor, params: QParams, norm: float) -> Iterator[_Chunk]:
    """Rows in chunks of about _BLOCK elements that all use the same two buffers."""
    height = max(1, _BLOCK // rows.shape[1])
    buffers = params.scale.new_empty(2, height * min(rows.shape[1], _BLOCK))
    scales, zero_points = params.scale.T, params.zero_point.T.to(params.scale.dtype)
    parts = zip(*(torch.split(values, height) for values in (rows, scales, zero_points)), strict=True)
    for part, scale, zero_point in parts:
        blocks = [
            (block, *buffers[:, : block.numel()].view(2, *block.shape))
            for block in torch.split(part.to(scale.dtype), _BLOCK, dim=1)
        ]
        offset = zero_point if bool(zero_point.any()) else None
        yield _Chunk(blocks, scale, offset, params.qmin, params.qmax, norm)


def _join(norms: Sequence[Tensor], norm: float) -> Tensor:
    """Norm of a row from the norms of its blocks."""
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(tuple(norms)), norm, 0)


def _check_finite(low: Tensor, high: Tensor) -> None:
    bad = ~(torch.isfinite(low) & torch.isfinite(high))
    if bool(bad.any()):
        raise CalibrationError(
            f"output channel {int(bad.nonzero()[0])} of a weight has values that are not finite"
        )
