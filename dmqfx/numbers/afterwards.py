"""Whether a scale is worth it once codes are sought with more care than rounding to nearest."""

from __future__ import annotations

import torch
from torch import Tensor

from dmqfx.numbers.equivalent import Scaling
from dmqfx.numbers.gptq import handed_on
from dmqfx.numbers.parts import Wide
from dmqfx.numbers.rounding import Grid, Reconstruction

__all__ = ["apart", "loss_afterwards"]

_EVERY = 4  # of so many rows one is for judging alone


def apart(problem: Scaling) -> tuple[Scaling, Scaling]:
    """The rows to learn from and those to judge by, which are a quarter."""
    judged = torch.arange(len(problem.group), device=problem.group.device) % _EVERY == _EVERY - 1
    return problem.part(~judged), problem.part(judged)


def loss_afterwards(learned_from: Scaling, judged: Scaling, gamma: Tensor) -> float:
    """The mean error of the judged rows with codes that hand each error on, found on the other rows.

    The means of outputs, which biases take, are left out. Shapes: gamma [C].
    """
    columns, shares = learned_from.given.columns(gamma), learned_from.shares(gamma)[0]
    x, seen = (each.given.rounded(gamma, shares, slice(None)) for each in (learned_from, judged))
    total = torch.zeros_like(judged.importance)
    for layer in learned_from.layers:
        problem = Reconstruction(
            given=x,
            wanted=learned_from.given.values @ layer.weight.T,
            weight=layer.weight * columns,
            spec=layer.spec,
            importance=learned_from.importance,
            metric=layer.root @ layer.root.T,
        )
        wide = Wide(problem, learned_from.given.taps)
        found = wide.rounded(wide.solved(handed_on))
        weight = Grid.of(found.params, len(layer.weight)).real(found.codes.flatten(1).double()).to(x)
        error = seen @ weight.T + found.offset.to(x) - judged.given.values @ layer.weight.T
        total = total + (error @ layer.root).square().sum(1)
    return float((total * judged.importance).mean())
