"""Learned equivalent scaling: the scale per input channel with the least error of what the layers make of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from dmqfx.numbers.fitting import Ends
from dmqfx.numbers.quant import QuantSpec
from dmqfx.numbers.ranges import search_range
from dmqfx.numbers.scaledinput import Input, grid_between, ratio, round_through
from dmqfx.numbers.weighting import TimestepWeights

__all__ = ["SURROGATE_STEPS", "Layer", "Learning", "Scaling", "View", "learn", "nbytes", "surrogate"]

SURROGATE_STEPS = 100
"""Steps to the scale of least expected error; each looks at no row."""

_PORTION = 1024  # rows that are looked at together
_COPIES = 6  # of what has the shape of a portion of the input, or of the weight


Shares = tuple[tuple[Tensor, Tensor], Tensor]
"""What part of its whole range each grid of a layer covers: of both ends of its input, and of its weight."""


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer that reads the tensor, the tensor as it is rounded for this layer, and what each row weighs.

    Shapes: weight [O, C * taps]; root [O, R] with root root' the metric of an error of the output; importance [N].
    """

    given: Input
    weight: Tensor
    spec: QuantSpec
    root: Tensor
    importance: Tensor

    @cached_property
    def felt(self) -> Tensor:
        """How much the square of an error in each column weighs [C * taps]."""
        return (self.root.T @ self.weight).square().sum(0)

    def shares(self, gamma: Tensor) -> Shares:
        """What part of its whole range each grid covers best, for a scale."""
        columns = self.given.columns(gamma)
        scaled = self.weight * columns
        searched, whole = (
            search_range(scaled, spec).scale for spec in (self.spec, replace(self.spec, range="minmax"))
        )
        return self.given.covered(gamma, self.felt * columns.square()), ratio(searched, whole).T

    def losses(self, gamma: Tensor, shares: Shares, rows: Tensor | slice) -> Tensor:
        """The error of the layer's output in each row, as it weighs, with gradients through rounding and ranges.

        Shapes: gamma [C]; rows picks n of the N; returns [n].
        """
        columns = self.given.columns(gamma)
        x, rounded = self.given.values[rows] / columns, self.given.rounded(gamma, shares[0], rows)
        scaled = self.weight * columns
        low, high = _weight_ends(scaled, self.spec)
        steps, zeros = grid_between(low * shares[1], high * shares[1], self.spec)
        error = rounded @ round_through(scaled, steps, zeros, self.spec).T - x @ scaled.T
        return (error @ self.root).square().sum(1) * self.importance[rows]

    def expected(self, gamma: Tensor) -> Tensor:
        """Twelve times the mean error if rounding were noise of a uniform law; see Scaling."""
        given, (ends, felt, outputs) = self.given, self._outline
        scale, _ = given.grid(gamma)
        share = torch.zeros_like(scale[:, 0]).index_add(0, given.group, self.importance) / len(given.group)
        low, high = (_whole(end * gamma, self.spec) for end in ends)
        low, high = low.clamp(max=0), high.clamp(min=0)
        steps, _ = grid_between(low.amin(1, keepdim=True), high.amax(1, keepdim=True), self.spec)
        noise: Tensor = ((share @ scale.square()) * felt * gamma.square()).sum()
        return noise + (self._power / gamma.square()).sum() * (steps[:, 0].square() * outputs).sum()

    @cached_property
    def _power(self) -> Tensor:
        """The second moments of the input's channels, rows as they weigh, summed over taps [C]."""
        values = torch.split(self.given.values, _PORTION)
        parts = zip(values, torch.split(self.importance, _PORTION), strict=True)
        moments = torch.stack([importance @ x.square() for x, importance in parts]).sum(0)
        return moments.view(-1, self.given.taps).sum(1) / len(self.importance)

    @cached_property
    def _outline(self) -> tuple[Ends, Tensor, Tensor]:
        """The extremes of the weight over taps [O, C], what channels are felt [C] and outputs [O]."""
        by_channel = self.weight.view(len(self.weight), -1, self.given.taps)
        felt = self.felt.view(-1, self.given.taps).sum(1)
        return (by_channel.amin(2), by_channel.amax(2)), felt, self.root.square().sum(1)


@dataclass(frozen=True, eq=False)
class View:
    """The tensor through one window, and the layers that see it so.

    Shapes: timestep group of each row for the weighting, int64 [N].
    """

    layers: Sequence[Layer]
    group: Tensor

    def losses(self, gamma: Tensor, shares: Sequence[Shares], rows: Tensor | slice) -> Tensor:
        """The error of the layers' outputs in each row, as it weighs.

        Shapes: gamma [C]; rows picks n of the N; returns [n].
        """
        each = zip(self.layers, shares, strict=True)
        return torch.stack([layer.losses(gamma, own, rows) for layer, own in each]).sum(0)

    def loss(self, gamma: Tensor) -> float:
        """The mean over all rows."""
        shares, total = self.shares(gamma), 0.0
        for start in range(0, len(self.group), _PORTION):
            rows = slice(start, start + _PORTION)
            total += float(self.losses(gamma, shares, rows).double().sum())
        return total / len(self.group)

    def shares(self, gamma: Tensor) -> list[Shares]:
        """Those of each layer."""
        return [layer.shares(gamma) for layer in self.layers]

    def expected(self, gamma: Tensor) -> Tensor:
        """The mean error if rounding were noise; see Scaling."""
        return torch.stack([layer.expected(gamma) for layer in self.layers]).sum() / 12


@dataclass(frozen=True)
class Scaling:
    """The problem: one tensor, and the layers that read it, by window."""

    views: Sequence[View]

    def loss(self, gamma: Tensor) -> float:
        """The mean error of all rows, each as it weighs, summed over windows."""
        return sum(view.loss(gamma) for view in self.views)

    def expected(self, gamma: Tensor) -> Tensor:
        """The mean error if rounding were noise of a uniform law, independent of what it rounds; with gradients.

        A step s adds s^2 / 12 to each number: those of the input weigh what their columns are felt, those of the
        weight what the input's second moments are. Nothing is rounded or clipped, so no row is looked at again.
        """
        return torch.stack([view.expected(gamma) for view in self.views]).sum()


def nbytes(rows: int, batch: int, columns: int, out: int) -> int:
    """The most that learning computes with: the scaled input that ranges are searched in, and a portion of the rows."""
    portion = max(batch, min(rows, _PORTION))
    return 4 * (columns * (rows + _COPIES * (portion + out)) + 2 * portion * out + 2 * out**2)


@dataclass(frozen=True)
class Learning:
    """How a scale is learned.

    Units: `rate` of Adam on log gamma, cosine to 0; `batch` rows at a time.
    """

    iterations: int
    rate: float = 0.05
    batch: int = 512


def learn(
    problem: Scaling,
    starts: Mapping[str, Tensor],
    how: Learning,
    weights: TimestepWeights,
    generator: torch.Generator,
) -> tuple[Tensor, str, float]:
    """The best of the starts, and what learning makes of it if that is better: (gamma, its name, loss).

    Source: DMQ (arXiv 2507.12933), learned equivalent scaling; here of log gamma, so that it stays positive.
    """
    losses = {name: problem.loss(gamma) for name, gamma in starts.items()}
    name = min(losses, key=lambda each: losses[each])
    if not how.iterations:
        return starts[name], name, losses[name]
    learned = _learned(problem, starts[name], how, weights, generator)
    after = problem.loss(learned)
    return (
        (learned, f"les from {name}", after) if after < losses[name] else (starts[name], name, losses[name])
    )


def surrogate(
    problem: Scaling, start: Tensor, iterations: int = SURROGATE_STEPS, rate: float = 0.1
) -> Tensor:
    """The scale of least expected error, which no rounding is tried for; see Scaling.expected.

    Shapes: start, result [C].
    """
    whole = float(problem.expected(start)) or 1.0
    return _descended(start, Learning(iterations, rate), lambda gamma: problem.expected(gamma) / whole)


def _learned(
    problem: Scaling, start: Tensor, how: Learning, weights: TimestepWeights, generator: torch.Generator
) -> Tensor:
    shares = [view.shares(start) for view in problem.views]

    def drawn(gamma: Tensor) -> Tensor:
        losses, group = [], []
        for view, own in zip(problem.views, shares, strict=True):
            rows = torch.randint(len(view.group), (how.batch,), generator=generator).to(view.group.device)
            losses.append(view.losses(gamma, own, rows))
            group.append(view.group[rows])
        found = torch.cat(losses)
        return (found * weights(found, torch.cat(group))).mean()

    return _descended(start, how, drawn)


def _descended(start: Tensor, how: Learning, objective: Callable[[Tensor], Tensor]) -> Tensor:
    """Adam on log gamma, with a cosine to 0; geometric mean 1."""
    logarithm = start.log().clone().requires_grad_()
    optimizer = torch.optim.Adam([logarithm], how.rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(how.iterations, 1))
    with torch.enable_grad():
        for _ in range(how.iterations):
            (logarithm.grad,) = torch.autograd.grad(objective(logarithm.exp()), [logarithm])
            optimizer.step()
            schedule.step()
    found = logarithm.detach()
    return (found - found.mean()).exp()


def _whole(weight: Tensor, spec: QuantSpec) -> Tensor:
    """The weight with a row for each scale."""
    return weight if spec.per == "channel" else weight.reshape(1, -1)


def _weight_ends(weight: Tensor, spec: QuantSpec) -> Ends:
    rows = _whole(weight, spec)
    return rows.amin(1, keepdim=True).clamp(max=0), rows.amax(1, keepdim=True).clamp(min=0)
