"""round-weights: integer codes for every planned weight, in the table."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dmqfx.errors import CalibrationError
from dmqfx.graph.address import Site
from dmqfx.graph.facts import CORRECTED, PLANNED, ROUNDED, Fact
from dmqfx.graph.options import above, at_least, between
from dmqfx.graph.pipeline import PassContext
from dmqfx.graph.program import Program
from dmqfx.graph.table import Bias, Codes, Entry, Sensitivity
from dmqfx.numbers import effort
from dmqfx.numbers.adaround import Annealing, Loss, annealed
from dmqfx.numbers.gptq import handed_on
from dmqfx.numbers.packing import pack
from dmqfx.numbers.parts import Wide, part_sizes
from dmqfx.numbers.quant import QuantSpec, quantize
from dmqfx.numbers.ranges import search_range
from dmqfx.numbers.rounding import Reconstruction
from dmqfx.numbers.speeds import Speeds
from dmqfx.numbers.weighting import UNEVEN, TimestepWeights, Weighting
from dmqfx.runtime.operators import timestep_group
from dmqfx.sweep.deploy import deployed_weight
from dmqfx.sweep.sweep import SweepPass, has_metric
from dmqfx.sweep.turn import Reader, Turn

LEARNING = ("start", "iterations", "warmup", "beta_start", "beta_end", "settling", "loss", "rate")
SOLVING = ("rows", "damping", "asymmetric", "biases", "weighting")


@dataclass(frozen=True)
class RoundWeights(SweepPass):
    """Write Codes for every planned weight; the float weight stays in the graph until insert-qdq.

    Where measure-sensitivity has run, `gptq` and `adaround` mind the UNet's output through the layer's, else
    the layer's alone; `damping` and `asymmetric` are those of Reconstruction. `adaround` begins with the codes
    of the method `start` and keeps those where it ends with a greater loss; `iterations`, `warmup`, the `beta`s,
    `settling`, `loss` and `rate` are those of Annealing; `norm` is that of search_range. With `biases`, what codes
    lack in the mean of a layer's output is put in its bias. `weighting` is what rows
    weigh by their timestep group, with what the output feels: `adaptive` goes by the error that the nearest codes
    make there, see TimestepWeights.

    Units: `rows` output positions make up a layer's local problem; `groups` are parts of equal width of the
    training timesteps, for the weighting, whose exponent is `strength`.
    Source: `nearest` rounds to the nearest code; `gptq` hands each error on (arXiv 2210.17323); `adaround` learns
    the side of each weight (arXiv 2004.10568).
    """

    requires: ClassVar[frozenset[Fact]] = frozenset({PLANNED})
    provides: ClassVar[frozenset[Fact]] = frozenset({ROUNDED})
    clears: ClassVar[frozenset[Fact]] = frozenset({CORRECTED})
    only_with: ClassVar[Mapping[str, tuple[str, tuple[str, ...]]]] = {
        **dict.fromkeys(LEARNING, ("method", ("adaround",))),
        **dict.fromkeys(SOLVING, ("method", ("gptq", "adaround"))),
        **dict.fromkeys(("strength", "groups"), ("weighting", UNEVEN)),
    }
    method: Literal["nearest", "gptq", "adaround"] = "gptq"
    rows: int = 8192
    norm: float = 2.0
    damping: float = 0.1
    asymmetric: float = 0.0
    start: Literal["nearest", "gptq"] = "nearest"
    iterations: int = Annealing.iterations
    warmup: float = Annealing.warmup
    beta_start: float = Annealing.beta_start
    beta_end: float = Annealing.beta_end
    settling: float = Annealing.settling
    loss: Loss = Annealing.loss
    rate: float = Annealing.rate
    biases: bool = True
    weighting: Weighting = "uniform"
    strength: float = 20.0
    groups: int = 20

    def __post_init__(self) -> None:
        at_least(self, 1, "rows", "iterations", "groups")
        at_least(self, 0, "damping", "settling", "strength")
        above(self, 0, "rate", "norm")
        above(self, 1, "beta_start", "beta_end")
        between(self, 0, 1, "asymmetric", "warmup")

    @property
    def needs_calibration(self) -> bool:
        """Only `nearest` looks at no activations."""
        return self.method != "nearest"

    @property
    def budgeted(self) -> frozenset[str]:
        """Iterations only where they are made."""
        return frozenset({"rows", "iterations"} if self.method == "adaround" else {"rows"})

    def cost(self, program: Program, reader: Reader, values: float, speeds: Speeds) -> float:
        """Seconds of a solution and of the steps of learning, or of the search of a range alone."""
        if not self.problem_rows(reader):
            return effort.weight_range(speeds, math.prod(reader.shape)) if reader.weight_spec else 0.0
        steps = self.iterations if self.method == "adaround" else 0
        columns, out, taps = math.prod(reader.shape[1:]), reader.shape[0], reader.geometry.taps
        learned = effort.learned_codes(
            speeds, steps, columns, out, metric=has_metric(program, reader), taps=taps
        )
        again = steps and self.start == "gptq" and len(part_sizes(columns, taps)) > 1  # each part begins anew
        return self.solution(program, reader, speeds) * (2 if again else 1) + learned

    def problem_rows(self, reader: Reader) -> int:
        """None for `nearest`, and for convolutions in groups, which are rounded so."""
        return super().problem_rows(reader) if reader.groups == 1 else 0

    def problem_nbytes(self, reader: Reader, rows: int) -> int:
        """What a solution of that many rows computes with, the deployed rows included."""
        if not self.problem_rows(reader):
            return 0
        columns, out = math.prod(reader.shape[1:]), reader.shape[0]
        return effort.nbytes(rows, columns, out, reader.geometry.taps)

    def visit(self, turn: Turn, ctx: PassContext) -> Iterator[tuple[Site, Entry]]:
        """Search the range, round, pack.

        Raises: CalibrationError naming the site of a weight that is not finite.
        """
        for reader in turn.readers:
            if reader.weight is None or reader.weight_spec is None:
                continue
            if ctx.journal.exhausted:
                return
            try:
                if self.method != "nearest" and reader.groups > 1:
                    why = f"a convolution in {reader.groups} groups has no local problem in common; rounded to nearest"
                    ctx.journal.refuse(reader.weight, self.method, why)
                if self.method == "nearest" or reader.groups > 1:
                    ctx.journal.apply(reader.weight, "nearest", str(reader.weight_spec))
                    yield reader.weight, nearest(turn.scaled_weight(reader), reader.weight_spec, self.norm)
                    yield from _own_bias(turn, reader)
                else:
                    yield from self._reconstructed(turn, reader, reader.weight, ctx)
            except CalibrationError as error:
                raise CalibrationError(f"{reader.weight}: {error}") from error

    def _reconstructed(
        self, turn: Turn, reader: Reader, at: Site, ctx: PassContext
    ) -> Iterator[tuple[Site, Entry]]:
        problem, spec = self._problem(turn, reader, ctx), reader.weight_spec
        assert spec is not None  # the caller looked
        codes, told = self._codes(problem)
        turn.loss = problem.relative_loss(codes) if ctx.progress else None
        ctx.journal.apply(at, self.method, f"{spec}{told}")
        found, adjacent = problem.rounded(codes), self.method == "adaround" and self.start == "nearest"
        shape = tuple(found.codes.shape)
        yield at, Codes(pack(found.codes, spec.bits), shape, found.params, nearest=False, adjacent=adjacent)
        if not self.biases:
            yield from _own_bias(turn, reader)
            return
        bias, offset = turn.bias(reader), found.offset.to(problem.whole.weight.dtype)
        yield Site(reader.site.at, "bias"), Bias(offset if bias is None else bias + offset)

    @property
    def _by_gptq(self) -> bool:
        """Whether codes may lie beside the target instead of the weight."""
        return "gptq" in (self.method, self.start)

    def _codes(self, problem: Wide) -> tuple[Tensor, str]:
        """Codes [O, K], and what became of learning them, in words."""
        start = problem.solved(handed_on) if self._by_gptq else problem.nearest
        if self.method == "gptq":
            return start, ""
        how = Annealing(
            self.iterations, self.warmup, self.beta_start, self.beta_end, self.settling, self.rate, self.loss
        )
        begin = handed_on if self._by_gptq else _nearest_codes
        codes = problem.improved(start, begin, lambda part, begun: annealed(part, begun, how))
        if codes is start:
            return start, f"; no gain over {self.start}, whose codes are kept"
        return codes, f"; {problem.loss(codes) / problem.loss(start):.2g} of the loss of {self.start}"

    def _problem(self, turn: Turn, reader: Reader, ctx: PassContext) -> Wide:
        assert reader.weight_spec is not None  # the caller looked
        rows = turn.rows(reader, self.rows)
        turn.reserve(self.problem_nbytes(reader, len(rows.real)), reader)
        felt = turn.table.get(Site(reader.site.at, "out"), Sensitivity)
        problem = Reconstruction(
            given=turn.deployed(reader, rows),
            wanted=turn.wanted(reader, rows),
            weight=turn.scaled_weight(reader),
            spec=reader.weight_spec,
            damping=self.damping,
            norm=self.norm,
            centred=self.biases,
            frozen=not self._by_gptq,
            asymmetric=self.asymmetric,
            importance=None if felt is None else felt.of(rows.timestep),
            metric=None if felt is None else felt.metric,
        )
        if self.weighting != "uniform":
            edges = torch.tensor([ctx.train_timesteps * k / self.groups for k in range(1, self.groups)])
            group = timestep_group(rows.timestep, edges.to(rows.timestep.device))
            problem = replace(problem, importance=self._weighed(problem, group))
        return Wide(problem, rows.taps)

    def _weighed(self, problem: Reconstruction, group: Tensor) -> Tensor:
        """What each row weighs, by the error of the nearest codes in its timestep group; means, which biases take, left out.

        Shapes: group int64 [N]; result [N].
        """
        codes = nearest(problem.weight, problem.spec, self.norm)
        rounded = deployed_weight(codes, problem.spec.bits).flatten(1).to(problem.given)
        error = problem.given @ rounded.T - problem.wanted.to(problem.given)
        losses = (error - error.mean(0)).square().sum(1)
        felt = torch.ones_like(losses) if problem.importance is None else problem.importance.to(losses)
        return felt * TimestepWeights(self.weighting, self.groups, self.strength)(losses * felt, group)


def _own_bias(turn: Turn, reader: Reader) -> Iterator[tuple[Site, Entry]]:
    """The layer's own bias instead of one that came with other codes."""
    site, bias = Site(reader.site.at, "bias"), turn.bias(reader)
    if (stale := turn.table.get(site, Bias)) is not None:
        yield site, Bias(stale.value.new_zeros(stale.value.shape) if bias is None else bias)


def _nearest_codes(problem: Reconstruction) -> Tensor:
    return problem.nearest


def nearest(weight: Tensor, spec: QuantSpec, norm: float = 2.0) -> Codes:
    """The nearest codes in the searched range.

    Shapes: weight [O, ...], one scale per output channel or one in all.
    """
    params = search_range(weight, spec, norm=norm)
    codes = quantize(
        weight, params.scale, params.zero_point, None, params.axis or 0, params.qmin, params.qmax
    )
    return Codes(pack(codes, spec.bits), tuple(weight.shape), params)
