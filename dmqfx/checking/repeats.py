"""Calls that come again: a program that keeps results between calls must notice what a caller changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dmqfx.checking.judges import Equal, Finding, Inputs, Judge
from dmqfx.checking.probes import draw
from dmqfx.graph.hoisting import hoisted_in
from dmqfx.graph.program import Program

__all__ = ["Repeated"]


class Repeated(Judge):
    """The same outputs, bit for bit, when one input after the other is written over in place, and back again.

    Only for programs that keep something, which hoisted values tell.
    """

    def __init__(self, before: Program, probes: Sequence[Inputs]) -> None:
        self.before, self.probes = before, probes

    def judge(self, after: Program) -> Finding:
        others = draw(self.before, torch.Generator().manual_seed(1)) if hoisted_in(after.graph) else []
        for probe, other in zip(self.probes, others, strict=False):
            given = {name: value.clone() for name, value in probe.items()}
            for when in _written(given, other):
                finding = Equal(self.before, [given]).judge(after)
                if finding.wrong:
                    return replace(finding, what=f"{finding.what}, {when}")
        return Finding(0.0, 0.0, "difference of the outputs of repeated calls")


def _written(given: dict[str, Tensor], other: Inputs) -> Iterator[str]:
    """What has just been written into the inputs, in words."""
    yield "with nothing changed"
    for name, value in given.items():
        kept = value.clone()
        value.copy_(other[name])
        yield f"with another {name} in the same tensor"
        value.copy_(kept)
        yield f"with the {name} of before in the same tensor"
