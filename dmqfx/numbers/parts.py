"""Local problems of many columns, solved in parts: what a part's codes lack is handed on through the rows.

A Gram of K columns takes K^2 numbers, several times, and a time that grows with K^3: for the widest convolutions
of a UNet gigabytes and hours. A part is a local problem of its own, of some input channels. What it is wanted to
give is its share by the float weight and what the other parts lack, so that correlations between parts count as
well, by the data instead of by the Gram.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dmqfx.numbers.quant import QParams
from dmqfx.numbers.ranges import search_range
from dmqfx.numbers.rounding import Grid, Reconstruction, Rounded, ridge

__all__ = ["WIDEST", "Part", "Wide", "part_sizes"]

WIDEST = 4608
"""Columns of a problem that is still solved as one: 170 MB for each copy of a Gram."""
_LOOK = 1024  # columns whose moments are taken together


def part_sizes(columns: int, taps: int = 1, widest: int = 0) -> tuple[int, ...]:
    """Columns of every part: whole channels, in shares as equal as can be, none wider than `widest`, or WIDEST.

    Example:
        >>> part_sizes(23040, 9), part_sizes(4608, 9), part_sizes(5120)
        ((4608, 4608, 4608, 4608, 4608), (4608,), (2560, 2560))
    """
    channels, widest = columns // taps, widest or WIDEST
    count = 1 if columns <= widest else -(-channels // max(1, widest // taps))
    return tuple((channels // count + (k < channels % count)) * taps for k in range(count))


@dataclass(frozen=True, eq=False, kw_only=True)
class Part(Reconstruction):
    """The local problem of some columns, where earlier parts' codes are known and later columns count as float.

    Shapes: given float64 [N, K], centred, times the root of the rows' share; wanted float64 [N, O], likewise: what
    the layer's output lacks with this part's float weight [O, K].
    """

    ridge: float
    range: QParams

    @cached_property
    def gram(self) -> Tensor:
        """X'X with the whole's ridge, float64 [K, K]."""
        gram = self.given.T @ self.given
        gram.diagonal().add_(self.ridge)
        return gram

    @cached_property
    def target(self) -> Tensor:
        """The weight that gives what lacks as well, as far as damping lets it, float64 [O, K]."""
        weight = self.weight.double()
        if not bool(self.wanted.any()):
            return weight
        lacking = self.given.T @ self.wanted
        solved: Tensor = torch.cholesky_solve(lacking, torch.linalg.cholesky(self.gram)).T
        return weight + solved

    @cached_property
    def params(self) -> QParams:
        """The range of the whole weight."""
        return self.range

    def lacking(self, codes: Tensor) -> Tensor:
        """What the output lacks with these codes [O, K], float64 [N, O]."""
        return torch.addmm(self.wanted, self.given, (self.weight.double() - self.grid.real(codes)).T)


@dataclass(frozen=True, eq=False)
class Wide:
    """A layer's local problem of any width; up to `widest` columns (0: WIDEST) it is solved whole.

    Units: taps are columns of one input channel, which no part cuts.
    """

    whole: Reconstruction
    taps: int = 1
    widest: int = 0

    @cached_property
    def parts(self) -> tuple[Tensor, ...]:
        """The columns of each part, int64: whole channels, those of most energy first."""
        energy = self._moments[1].view(-1, self.taps).sum(1)
        sizes = [size // self.taps for size in part_sizes(len(self._weight.T), self.taps, self.widest)]
        shares = torch.split(energy.argsort(descending=True, stable=True), sizes)
        taps = torch.arange(self.taps, device=energy.device)
        return tuple((share[:, None] * self.taps + taps).flatten() for share in shares)

    @property
    def is_whole(self) -> bool:
        """Whether there is one part."""
        return len(part_sizes(len(self._weight.T), self.taps, self.widest)) == 1

    @property
    def nearest(self) -> Tensor:
        """The codes nearest to the weight [O, K]: float64, or int16 where there are parts."""
        if self.is_whole:
            return self.whole.nearest
        return self._filled(self._grid.exact(self._weight[:, own].double()).round() for own in self.parts)

    def solved(self, solve: Callable[[Reconstruction], Tensor]) -> Tensor:
        """Codes [O, K] part by part; what the parts before lack is handed on, those after count as float."""
        if self.is_whole:
            return solve(self.whole)
        left, found = self._at_first, list[Tensor]()
        for columns in self.parts:
            part = self._part(columns, left)
            found.append(solve(part))
            left = part.lacking(found[-1])
        return self._filled(found)

    def improved(
        self,
        start: Tensor,
        begin: Callable[[Reconstruction], Tensor],
        solve: Callable[[Reconstruction, Tensor], Tensor],
    ) -> Tensor:
        """Codes [O, K] by a method that goes on from others, or `start` itself where it ends with no less loss.

        Shapes: start [O, K], what `begin` gives, as `solved` says; each part begins with its own from the new left.
        """
        if self.is_whole:
            return solve(self.whole, start)
        found = self.solved(lambda part: solve(part, begin(part)))
        return found if self.loss(found) < self.loss(start) else start

    def loss(self, codes: Tensor) -> float:
        """The energy of the output's error, in the metric, with what damping adds."""
        if self.is_whole:
            return self.whole.loss(codes)
        energy = self._felt_energy(self._lacking(codes))
        for columns in self.parts:
            change = self._weight[:, columns].double() - self._grid.real(codes[:, columns].double())
            energy += self._ridge * self._felt_energy(change.T)
        return energy

    def relative_loss(self, codes: Tensor) -> float:
        """The same relative to that of a weight of 0."""
        grid = self.whole.grid if self.is_whole else self._grid
        nothing = self.loss(grid.zero_point[:, None].expand_as(codes))
        return self.loss(codes) / nothing if nothing > 0 else 0.0

    def rounded(self, codes: Tensor) -> Rounded:
        """The result with these codes [O, K]."""
        if self.is_whole:
            return self.whole.rounded(codes)
        offset = self._mean_wanted
        for own in self.parts:
            offset = offset - self._grid.real(codes[:, own].double()) @ self._moments[0][own]
        return Rounded.of(codes, self.whole.weight.shape, self._params, offset)

    def _filled(self, found: Iterable[Tensor]) -> Tensor:
        """Codes of all columns, int16, from those of the parts in their order."""
        codes = torch.empty_like(self._weight, dtype=torch.int16)
        for columns, own in zip(self.parts, found, strict=True):
            codes[:, columns] = own.to(torch.int16)
        return codes

    @property
    def _weight(self) -> Tensor:
        return self.whole.weight.flatten(1)

    @cached_property
    def _params(self) -> QParams:
        """The searched range of the whole weight."""
        return search_range(self.whole.weight, self.whole.spec, norm=self.whole.norm)

    @cached_property
    def _grid(self) -> Grid:
        return Grid.of(self._params, len(self._weight))

    @cached_property
    def _mean_wanted(self) -> Tensor:
        mean = self.whole.share @ self.whole.wanted.double()
        return mean if self.whole.centred else torch.zeros_like(mean)

    @cached_property
    def _moments(self) -> tuple[Tensor, Tensor]:
        """Mean and energy of every column, float64 [K]."""
        share, means, energies = self.whole.share, list[Tensor](), list[Tensor]()
        for given in torch.split(self.whole.given, _LOOK, 1):
            x = given.to(torch.float64, copy=True)
            means.append(share @ x if self.whole.centred else torch.zeros_like(x[0]))
            energies.append(share @ x.sub_(means[-1]).square_())
        return torch.cat(means), torch.cat(energies)

    @cached_property
    def _ridge(self) -> float:
        return ridge(self.whole.damping, float(self._moments[1].mean()))

    @cached_property
    def _at_first(self) -> Tensor:
        """What the float weight's outputs lack of what is wanted, as far as that counts, float64 [N, O]."""
        wanted, root = self.whole.wanted, self.whole.share.sqrt()[:, None]
        if not self.whole.asymmetric:
            return torch.zeros_like(wanted, dtype=torch.float64)
        left = (wanted.double() - self._mean_wanted) * root
        for columns in self.parts:
            left.addmm_(self._x(columns), self._weight[:, columns].double().T, alpha=-1)
        return left.mul_(self.whole.asymmetric)

    def _lacking(self, codes: Tensor) -> Tensor:
        left = self._at_first.clone()
        for columns in self.parts:
            change = self._weight[:, columns].double() - self._grid.real(codes[:, columns].double())
            left.addmm_(self._x(columns), change.T)
        return left

    def _felt_energy(self, rows: Tensor) -> float:
        felt = self.whole.felt
        return float(rows.square().sum() if felt is None else (rows @ felt).mul_(rows).sum())

    def _x(self, columns: Tensor) -> Tensor:
        """The inputs of some columns, centred, times the root of the rows' share, float64."""
        x = self.whole.given[:, columns].double()
        return x.sub_(self._moments[0][columns]).mul_(self.whole.share.sqrt()[:, None])

    def _part(self, columns: Tensor, left: Tensor) -> Part:
        return Part(
            given=self._x(columns), wanted=left, weight=self._weight[:, columns], spec=self.whole.spec,
            damping=self.whole.damping, metric=self.whole.metric, range=self._params, ridge=self._ridge,
        )  # fmt: skip
