"""learn-scaling: the equivalent scale of every pair, which moves difficulty between activation and weight."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dmqfx.graph.address import Site
from dmqfx.graph.facts import (
    CALIBRATED,
    CORRECTED,
    FITTED,
    LEARNED,
    PAIRED,
    ROUNDED,
    SHIFTED,
    STEPPED,
    Fact,
)
from dmqfx.graph.pipeline import PassContext
from dmqfx.graph.program import Program
from dmqfx.graph.table import Bias, ChannelScale, Codes, Entry, LayerPair, Range, Sensitivity, Shift, Table
from dmqfx.numbers import effort
from dmqfx.numbers.equivalent import SURROGATE_STEPS, Layer, Learning, Scaling, View, learn, nbytes, surrogate
from dmqfx.numbers.quant import QParams
from dmqfx.numbers.scaledinput import Input
from dmqfx.numbers.speeds import Speeds
from dmqfx.numbers.weighting import UNEVEN, TimestepWeights, Weighting
from dmqfx.runtime.operators import timestep_group
from dmqfx.sweep.rows import Rows
from dmqfx.sweep.sweep import SweepPass
from dmqfx.sweep.turn import Reader, Turn

LIMIT = 1e4
STARTS = {"identity": (0.0, 0.0), "even": (0.25, 0.25), "smoothquant": (0.5, 0.5), "activation": (0.5, 0.25)}
"""Exponents of the activation's and of the weight's absolute maximum in the scales that `les` starts from."""


LEARNING = ("iterations", "batch", "rate", "weighting")


@dataclass(frozen=True)
class LearnScaling(SweepPass):
    """Write a ChannelScale per pair.

    `smoothquant` needs no more than observed ranges. `surrogate` minimizes the error that steps of this size are
    expected to make. `les` takes the best of several closed forms and the surrogate's, and learns on from there:
    what the layers make of x / gamma and W * gamma, both rounded as planned, shall differ least from the float
    product; what measure-sensitivity knows of the output counts, and so do shifts that were voted on before. A scale
    that is no better than its start is not taken. As published, it begins at 1 with `start` identity, and weights
    have the range of their extremes with `weights` extremes. `weighting` is that of timestep groups while learning.

    Units: exponent 0..1 is the share of the difficulty that moves from the activation into the weight; `rows`
    output positions make up a problem, `batch` of them a step of Adam of rate `rate` on log gamma; `groups` are
    parts of equal width of the training timesteps.
    Source: `smoothquant` is the closed form of SmoothQuant (arXiv 2211.10438, eq. 4); `les` and its weighting are
    DMQ's (arXiv 2507.12933).
    """

    requires: ClassVar[frozenset[Fact]] = frozenset({PAIRED})
    provides: ClassVar[frozenset[Fact]] = frozenset({LEARNED})
    clears: ClassVar[frozenset[Fact]] = frozenset({ROUNDED, CORRECTED, FITTED, SHIFTED, STEPPED})
    only_with: ClassVar[Mapping[str, tuple[str, tuple[str, ...]]]] = {
        **dict.fromkeys(LEARNING, ("method", ("les",))),
        **dict.fromkeys(("strength", "groups"), ("weighting", UNEVEN)),
        **dict.fromkeys(("start", "weights", "rows"), ("method", ("surrogate", "les"))),
        "exponent": ("method", ("smoothquant",)),
    }
    method: Literal["smoothquant", "surrogate", "les"] = "smoothquant"
    exponent: float = 0.5
    start: Literal["best", "identity"] = "best"
    weights: Literal["planned", "extremes"] = "planned"
    iterations: int = 80
    rows: int = 2048
    batch: int = 256
    rate: float = 0.05
    weighting: Weighting = "adaptive"
    strength: float = 20.0
    groups: int = 20

    def __post_init__(self) -> None:
        if not 0 <= self.exponent <= 1:
            raise ValueError(f"exponent must be between 0 and 1, not {self.exponent}")
        for name in ("rows", "batch", "groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.iterations < 0:
            raise ValueError(f"iterations must be at least 0, not {self.iterations}")
        if self.rate <= 0 or self.strength < 0:
            raise ValueError(
                f"rate must be above 0 and strength at least 0, not {self.rate} and {self.strength}"
            )

    @property
    def needs(self) -> frozenset[Fact]:
        """The closed form alone asks for ranges that were observed before."""
        return self.requires | {CALIBRATED} if self.method == "smoothquant" else self.requires

    @property
    def needs_calibration(self) -> bool:
        """All but the closed form look at activations."""
        return self.method != "smoothquant"

    def cost(self, program: Program, reader: Reader, values: float, speeds: Speeds) -> float:
        """Seconds of the starts and of the steps from the best of them."""
        if not self.problem_rows(reader) or reader.spec is None or not reader.shape:
            return 0.0
        columns, out = math.prod(reader.shape[1:]), reader.shape[0]
        if self.method == "surrogate":
            looks, taps = SURROGATE_STEPS + len(STARTS) + 1, reader.geometry.taps
            return effort.surrogate_scale(speeds, looks, self.rows, columns, out, taps=taps)
        looks = 2 * (len(STARTS) + 2)  # a start's ranges are searched, which takes as long as its loss
        tried = effort.learned_scale(speeds, looks, self.rows, columns, out)
        steps = self.iterations if self.method == "les" else 0
        return tried + effort.learned_scale(speeds, steps, self.batch, columns, out)

    def problem_nbytes(self, reader: Reader, rows: int) -> int:
        """What learning from that many rows computes with."""
        if not self.problem_rows(reader) or not reader.shape:
            return 0
        return nbytes(rows, self.batch, math.prod(reader.shape[1:]), reader.shape[0])

    def visit(self, turn: Turn, ctx: PassContext) -> Iterator[tuple[Site, Entry]]:
        """One scale for all that read the tensor."""
        found = next((r.site for r in turn.readers if turn.table.get(r.site, LayerPair) is not None), None)
        pair = None if found is None else turn.table.get(found, LayerPair)
        if found is None or pair is None:
            return
        readers = [reader for reader in turn.readers if reader.site in pair.readers]
        seen = turn.range(_boundaries(readers)) if self.needs_calibration else turn.table.get(found, Range)
        if seen is None:
            self._refuse(turn, ctx, found, readers, "the input has no calibrated range")
            return
        x = torch.maximum(seen.low.abs(), seen.high.abs()).amax(0)
        w = torch.stack([_peak_by_input(turn.weight(reader), len(x)) for reader in readers]).amax(0)
        if self.method == "smoothquant":
            gamma, how = closed_form(x.double(), w.double(), self.exponent).to(w.dtype), "the closed form"
        else:
            gamma, how = self._learned(turn, readers, ctx, (x, w))
        if bool((gamma == 1).all()):
            self._refuse(turn, ctx, found, readers, f"{how} is 1 for every channel")
        elif ctx.journal.apply(found, self.method, f"gamma {gamma.min():.3g} .. {gamma.max():.3g}"):
            for reader in readers:
                turn.table = _forgotten(turn.table, reader)
            yield found, ChannelScale(gamma)

    def _refuse(self, turn: Turn, ctx: PassContext, at: Site, readers: Sequence[Reader], why: str) -> None:
        """No scale, and none of a step before with what was made for it: this one has the last word."""
        ctx.journal.refuse(at, self.method, why)
        if turn.table.get(at, ChannelScale) is not None and not ctx.journal.exhausted:
            turn.table = turn.table.drop(at, ChannelScale)
            for reader in readers:
                turn.table = _forgotten(turn.table, reader)

    def _learned(
        self,
        turn: Turn,
        readers: Sequence[Reader],
        ctx: PassContext,
        peaks: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, str]:
        if any(reader.groups > 1 for reader in readers):
            return torch.ones_like(peaks[0]), "the start of layers in groups"
        edges = torch.tensor([ctx.train_timesteps * k / self.groups for k in range(1, self.groups)])
        problem = self._problem(turn, readers, edges)
        x, w = (peak.double() for peak in peaks)
        kinds = STARTS if self.start == "best" else {"identity": STARTS["identity"]}
        starts = {name: powers(x, w, *pair).to(peaks[1].dtype) for name, pair in kinds.items()}
        if self.method == "surrogate" or self.start == "best":
            nearest = min(starts.values(), key=lambda gamma: float(problem.expected(gamma)))
            starts["surrogate"] = surrogate(problem, nearest)
        if self.method == "surrogate":
            return starts["surrogate"], "the scale of least expected error"
        weights = TimestepWeights(self.weighting, self.groups, self.strength)
        how = Learning(self.iterations, self.rate, self.batch)
        gamma, name, turn.loss = learn(problem, starts, how, weights, turn.generator())
        return gamma, f"the best start, {name},"

    def _problem(self, turn: Turn, readers: Sequence[Reader], edges: Tensor) -> Scaling:
        """The rows that are drawn, those of each window apart."""
        shape = turn.source.meta["val"].shape
        views, positions = [], []
        for geometry in dict.fromkeys(reader.geometry for reader in readers):
            own = [reader for reader in readers if reader.geometry == geometry]
            rows = turn.rows(own[0], self.rows)
            turn.reserve(max(self.problem_nbytes(reader, len(rows.real)) for reader in own), own[0])
            if self.weights == "extremes":
                own = [_by_extremes(reader) for reader in own]
            views.append(_view(turn, own, rows, edges))
            positions.append(int(geometry.positions(shape)))
        return _weighed(views, positions)


def _forgotten(table: Table, reader: Reader) -> Table:
    """Without what was decided for a layer's input and weight before they were scaled."""
    at = reader.site.at
    for site, kinds in (
        (reader.site, (QParams, Shift)),
        (Site(at, "weight"), (Codes,)),
        (Site(at, "bias"), (Bias,)),
    ):
        for kind in kinds:
            table = table.drop(site, kind)
    return table


def _by_extremes(reader: Reader) -> Reader:
    """With a range of the weight that is that of its extremes."""
    spec = reader.weight_spec
    return reader if spec is None else replace(reader, weight_spec=replace(spec, range="minmax"))


def _boundaries(readers: Sequence[Reader]) -> tuple[float, ...]:
    spec = readers[0].spec
    assert spec is not None  # pair-layers takes planned inputs
    return spec.boundaries


def _view(turn: Turn, readers: Sequence[Reader], rows: Rows, edges: Tensor) -> View:
    """The layers of one window; `edges` cut the rows into the groups of the weighting."""
    layers, values = list[Layer](), None
    for reader in readers:
        assert reader.weight_spec is not None
        given, weight = _input(turn, reader, rows), turn.weight(reader).flatten(1)
        values = given.values if values is None else values  # one tensor, and so in one unit for all
        felt = turn.table.get(Site(reader.site.at, "out"), Sensitivity)
        importance = values.new_ones(len(values)) if felt is None else felt.of(rows.timestep).to(values)
        own = replace(given, values=values)
        layers.append(Layer(own, weight, reader.weight_spec, _root(felt, weight), importance))
    return View(layers, timestep_group(rows.timestep, edges.to(rows.timestep.device)))


def _input(turn: Turn, reader: Reader, rows: Rows) -> Input:
    """The rows, and all that decides how they are rounded for this reader."""
    spec = reader.spec
    assert spec is not None  # pair-layers takes planned inputs
    seen, voted = turn.range(spec.boundaries), turn.table.get(reader.site, Shift)
    own = timestep_group(rows.timestep, torch.tensor(spec.boundaries, device=rows.timestep.device))
    by_row = None
    if spec.range == "ema":
        by_row = turn.row_extremes(spec.boundaries).joined(1, turn.generator())
    finer = None if voted is None else voted.factor.expand(len(seen.low), -1)
    return Input(rows.quantized, own, seen.low, seen.high, spec, rows.taps, by_row, finer).in_reach()


def _weighed(views: Sequence[View], positions: Sequence[int]) -> Scaling:
    """The problem in which all outputs together would be an error of 1, a window counting by its positions."""
    shares = [count / max(positions) for count in positions]
    unit = sum(share * _power(view) for share, view in zip(shares, views, strict=True)) or 1.0
    found = []
    for view, share in zip(views, shares, strict=True):
        layers = [replace(each, importance=each.importance * (share / unit)) for each in view.layers]
        found.append(replace(view, layers=layers))
    return Scaling(found)


def _power(view: View) -> float:
    """The mean square of what the layers put out, in the metric of each."""
    outputs = (each.given.values @ each.weight.T @ each.root for each in view.layers)
    return sum(float(out.square().sum(1).mean()) for out in outputs)


def _root(felt: Sensitivity | None, weight: Tensor) -> Tensor:
    """A root of the metric, which is the identity if there is none."""
    if felt is None or felt.metric is None:
        return torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
    values, vectors = torch.linalg.eigh(felt.metric.double())
    root: Tensor = (vectors * values.clamp(min=0).sqrt()).to(weight)
    return root


def closed_form(x: Tensor, w: Tensor, exponent: float) -> Tensor:
    """The scale that splits the range between activation and weight; dead channels get 1.

    Shapes: x, w, result [C]: absolute maxima of the input's channels and of the weight's columns.
    Source: SmoothQuant (arXiv 2211.10438), eq. 4.
    """
    if exponent == 0 and not bool((w != w[0]).any()):
        return torch.ones_like(x)
    return powers(x, w, exponent, 1 - exponent)


def powers(x: Tensor, w: Tensor, of_x: float, of_w: float) -> Tensor:
    """x^a / w^b, with geometric mean 1 over live channels; dead ones get 1.

    Shapes: as for closed_form.
    """
    live = (x > 0) & (w > 0) & torch.isfinite(x) & torch.isfinite(w)
    if not bool(live.any()):
        return torch.ones_like(x)
    tiny = torch.finfo(x.dtype).tiny
    logarithm = of_x * x.clamp_min(tiny).log() - of_w * w.clamp_min(tiny).log()
    centred = logarithm - logarithm[live].mean()
    gamma = centred.exp().clamp(1 / LIMIT, LIMIT)
    return torch.where(live, gamma, torch.ones_like(gamma))


def _peak_by_input(weight: Tensor, channels: int) -> Tensor:
    """absmax of the weight's columns per input channel [C]; a group's columns go to its own channels."""
    groups = channels // weight.shape[1]
    peaks = weight.abs().flatten(2).amax(2) if weight.dim() > 2 else weight.abs()
    return peaks.view(groups, -1, weight.shape[1]).amax(1).flatten()
