"""Identity modules that see every value of a site and keep its statistics, per timestep group and channel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor, nn

from dmqfx.errors import CalibrationError
from dmqfx.graph.table import Range
from dmqfx.numbers.voting import nearest_full

__all__ = ["Observer"]

_ELEMENTS = (
    2**20
)  # rows are taken together up to about this many values, so that the second look finds them in cache


class Observer(nn.Module):
    """x -> x, bit for bit, with running minimum, maximum, mean and variance (merged in float64).

    Shapes: x [B, ...] with C channels on `axis`, which is not dim 0; group int64 [B], None if G is 1.

    Example:
        >>> observer = Observer("conv_in/conv2d:input", axis=1)
        >>> x = torch.tensor([[1.0, 5.0], [3.0, 5.0]])
        >>> observer(x) is x, observer.result().mean
        (True, tensor([[2., 5.]]))
    """

    def __init__(self, site: str, axis: int, boundaries: tuple[float, ...] = ()) -> None:
        super().__init__()
        self.site, self.axis, self.boundaries = site, axis, boundaries
        self._seen: _Moments | None = None

    def forward(self, x: Tensor, group: Tensor | None = None) -> Tensor:
        """x itself.

        Raises: CalibrationError if the channels are not as many as before, or the group index does not fit.
        """
        rows = None if group is None else len(group)
        if rows != (x.shape[0] if self.boundaries else None):
            expected = f"a group index of {x.shape[0]} rows" if self.boundaries else "no group index"
            raise CalibrationError(f"{self.site}: input {list(x.shape)} needs {expected}, not {rows}")
        before = None if self._seen is None else self._seen.low.shape[1]
        if before not in (None, x.shape[self.axis]):
            counts = f"{before} channels before and {x.shape[self.axis]} now"
            raise CalibrationError(f"{self.site}: {counts} on axis {self.axis}")
        with torch.no_grad():
            height = max(1, _ELEMENTS * x.shape[0] // max(1, x.numel()))
            for start in range(0, x.shape[0] if x.numel() else 0, height):
                index = None if group is None else group[start : start + height]
                new = _Moments.of(x[start : start + height], self.axis, index, len(self.boundaries) + 1)
                self._seen = new if self._seen is None else self._seen.merge(new)
        return x

    def join(self, gather: Callable[[Tensor], Tensor]) -> None:
        """Take in what the observers of this site saw in other processes: the same in all of them.

        `gather` maps [1, ...] to [processes, ...]. Extremes and counts are those of one observer of all rows;
        means and variances differ from its in the last digits of float64.
        """
        if self._seen is not None:
            first, *others = self._seen.joined(gather)
            self._seen = reduce(_Moments.merge, others, first)

    def result(self) -> Range:
        """What has been seen; a group without rows takes the numbers of the nearest group that has some.

        Raises: CalibrationError if nothing was seen, or a value that is not finite.
        """
        if self._seen is None:
            raise CalibrationError(f"{self.site}: no calibration row reached it")
        seen = self._seen
        bad = ~(torch.isfinite(seen.low) & torch.isfinite(seen.high)) & (seen.count > 0)
        if bool(bad.any()):
            group, channel = bad.nonzero()[0].tolist()
            where = f"channel {channel}" + (f" of timestep group {group}" if self.boundaries else "")
            raise CalibrationError(f"{self.site}: calibration saw a value that is not finite in {where}")
        kept = seen.low.dtype
        mean, variance = seen.mean.to(kept), (seen.spread / seen.count.clamp(min=1)).to(kept)
        low, high, mean, variance = (
            value[nearest_full(seen.count[:, 0])] for value in (seen.low, seen.high, mean, variance)
        )
        return Range(low, high, mean, variance, seen.count[:, 0].long(), self.axis, self.boundaries)


@dataclass(frozen=True, eq=False)
class _Moments:
    """Extremes in the dtype of the data; mean and summed squared deviation in float64.

    Shapes: low, high, mean, spread [G, C], inf, -inf, 0, 0 for an empty group; count [G, 1] per channel.
    Source: pairwise merging of moments; Chan, Golub and LeVeque 1979.
    """

    count: Tensor
    low: Tensor
    high: Tensor
    mean: Tensor
    spread: Tensor

    @staticmethod
    def of(x: Tensor, axis: int, group: Tensor | None, groups: int) -> _Moments:
        """Of all values (G = 1), or of each group's rows."""
        x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        channel_dim = axis % x.dim()
        x = x.unsqueeze(-1)
        dims = [d for d in range(x.dim()) if d != channel_dim and (d != 0 or group is None)]
        low, high, mean = x.amin(dims), x.amax(dims), x.mean(dims, keepdim=True)
        deviation = x - mean
        spread = deviation.mul_(deviation).sum(dims)
        rows = x.shape[0] if group is not None else 1
        shape = (rows, x.shape[channel_dim])
        count = torch.full((rows, 1), x[0].numel() // shape[1], dtype=torch.float64, device=x.device)
        if group is None:
            count = count * x.shape[0]
        of_rows = _Moments(
            count, low.view(shape), high.view(shape), mean.view(shape).double(), spread.view(shape).double()
        )
        return of_rows if group is None else of_rows._gathered(group, groups)

    def _gathered(self, group: Tensor, groups: int) -> _Moments:
        """Rows merged by group."""
        shape = (groups, self.low.shape[1])
        index = group[:, None].expand_as(self.low)
        low = self.low.new_full(shape, torch.inf).scatter_reduce_(0, index, self.low, "amin")
        high = self.high.new_full(shape, -torch.inf).scatter_reduce_(0, index, self.high, "amax")
        count = self.count.new_zeros(groups, 1).index_add_(0, group, self.count)
        mean = self.mean.new_zeros(shape).index_add_(0, group, self.mean * self.count) / count.clamp(min=1)
        spread = self.spread + (self.mean - mean[group]).square() * self.count
        return _Moments(count, low, high, mean, self.mean.new_zeros(shape).index_add_(0, group, spread))

    def joined(self, gather: Callable[[Tensor], Tensor]) -> Sequence[_Moments]:
        """Those of every process, in order."""
        parts = [gather(value[None]) for value in vars(self).values()]
        return [_Moments(*each) for each in zip(*parts, strict=True)]

    def merge(self, other: _Moments) -> _Moments:
        """Of both together."""
        count = self.count + other.count
        share = other.count / count.clamp(min=1)
        shift = other.mean - self.mean
        return _Moments(
            count,
            torch.minimum(self.low, other.low),
            torch.maximum(self.high, other.high),
            self.mean + shift * share,
            self.spread + other.spread + shift.square() * self.count * share,
        )
