"""learn-scaling: the equivalent scale of every pair, which moves difficulty between activation and weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dmqfx.graph.address import Site
from dmqfx.graph.facts import CALIBRATED, FITTED, LEARNED, PAIRED, ROUNDED, Fact
from dmqfx.graph.pipeline import Pass, PassContext, Preserves
from dmqfx.graph.program import Program
from dmqfx.graph.table import ChannelScale, LayerPair, Range

LIMIT = 1e4


@dataclass(frozen=True)
class LearnScaling(Pass):
    """Write a ChannelScale per pair.

    Units: exponent 0..1 is the share of the difficulty that moves from the activation into the weight.
    Source: `smoothquant` is the closed form of SmoothQuant (arXiv 2211.10438, eq. 4).
    """

    requires: ClassVar[frozenset[Fact]] = frozenset({PAIRED, CALIBRATED})
    provides: ClassVar[frozenset[Fact]] = frozenset({LEARNED})
    clears: ClassVar[frozenset[Fact]] = frozenset({ROUNDED, FITTED})
    preserves: ClassVar[Preserves] = Preserves.BITWISE
    method: Literal["smoothquant"] = "smoothquant"
    exponent: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.exponent <= 1:
            raise ValueError(f"exponent must be between 0 and 1, not {self.exponent}")

    def run(self, program: Program, ctx: PassContext) -> Program:
        """gamma = absmax(x)^a / absmax(W)^(1 - a) per input channel; geometric mean 1 over live channels."""
        found: dict[Site, ChannelScale] = {}
        for site, pair in ctx.journal.fuelled(program.table.of(LayerPair).items()):
            seen = program.table.get(site, Range)
            if seen is None:
                ctx.journal.refuse(site, self.method, "the input has no calibrated range")
                continue
            x = torch.maximum(seen.low.abs(), seen.high.abs()).amax(0)
            w = torch.stack([_peak_by_input(program, reader, len(x)) for reader in pair.readers]).amax(0)
            gamma = closed_form(x.double(), w.double(), self.exponent).to(w.dtype)
            if bool((gamma == 1).all()):
                ctx.journal.refuse(site, self.method, "the closed form is 1 for every channel")
            elif ctx.journal.apply(site, self.method, f"gamma {gamma.min():.3g} .. {gamma.max():.3g}"):
                found[site] = ChannelScale(gamma)
        return program.with_table(program.table.put_all(found))


def closed_form(x: Tensor, w: Tensor, exponent: float) -> Tensor:
    """The scale that splits the range between activation and weight; dead channels get 1.

    Shapes: x, w, result [C]: absolute maxima of the input's channels and of the weight's columns.
    Source: SmoothQuant (arXiv 2211.10438), eq. 4.
    """
    live = (x > 0) & (w > 0) & torch.isfinite(x) & torch.isfinite(w)
    if (exponent == 0 and not bool((w != w[0]).any())) or not bool(live.any()):
        return torch.ones_like(x)
    tiny = torch.finfo(x.dtype).tiny
    logarithm = exponent * x.clamp_min(tiny).log() - (1 - exponent) * w.clamp_min(tiny).log()
    centred = logarithm - logarithm[live].mean()
    gamma = centred.exp().clamp(1 / LIMIT, LIMIT)
    return torch.where(live, gamma, torch.ones_like(gamma))


def _peak_by_input(program: Program, reader: Site, channels: int) -> Tensor:
    """absmax of the weight's columns per input channel [C]; a group's columns go to its own channels."""
    weight = program.constant_at(Site(reader.at, "weight"))
    groups = channels // weight.shape[1]
    peaks = weight.detach().abs().flatten(2).amax(2) if weight.dim() > 2 else weight.detach().abs()
    return peaks.view(groups, -1, weight.shape[1]).amax(1).flatten()
