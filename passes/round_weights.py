"""round-weights: integer codes for every planned weight, in the table."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from dmqfx.errors import CalibrationError
from dmqfx.graph.address import Site
from dmqfx.graph.facts import PLANNED, ROUNDED, Fact
from dmqfx.graph.pipeline import PassContext
from dmqfx.graph.program import Program
from dmqfx.graph.table import Bias, Codes, Entry, Sensitivity
from dmqfx.numbers import effort
from dmqfx.numbers.packing import pack
from dmqfx.numbers.quant import QuantSpec, quantize
from dmqfx.numbers.ranges import search_range
from dmqfx.numbers.rounding import Reconstruction, reconstruct
from dmqfx.numbers.speeds import Speeds
from dmqfx.sweep.sweep import SweepPass
from dmqfx.sweep.turn import Reader, Turn


@dataclass(frozen=True)
class RoundWeights(SweepPass):
    """Write Codes for every planned weight; the float weight stays in the graph until insert-qdq.

    Where measure-sensitivity has run, `gptq` minds the UNet's output through the layer's, else the layer's
    alone; `damping` and `asymmetric` are those of Reconstruction.

    Units: `rows` output positions make up a layer's local problem.
    Source: `nearest` rounds to the nearest code; `gptq` hands each error on (arXiv 2210.17323).
    """

    requires: ClassVar[frozenset[Fact]] = frozenset({PLANNED})
    provides: ClassVar[frozenset[Fact]] = frozenset({ROUNDED})
    method: Literal["nearest", "gptq"] = "nearest"
    rows: int = 8192
    damping: float = 0.1
    asymmetric: float = 0.0

    @property
    def needs_calibration(self) -> bool:
        """Only `nearest` looks at no activations."""
        return self.method != "nearest"

    def cost(self, program: Program, reader: Reader, values: float, speeds: Speeds) -> float:
        """Seconds of `reconstruct`, or of the search of a range alone."""
        if self.problem_rows(reader):
            return super().cost(program, reader, values, speeds)
        return effort.weight_range(speeds, math.prod(reader.shape)) if reader.weight_spec else 0.0

    def problem_rows(self, reader: Reader) -> int:
        """None for `nearest`, and for convolutions in groups, which are rounded so."""
        return super().problem_rows(reader) if reader.groups == 1 else 0

    def visit(self, turn: Turn, ctx: PassContext) -> Iterator[tuple[Site, Entry]]:
        """Search the range, round, pack.

        Raises: CalibrationError naming the site of a weight that is not finite.
        """
        for reader in turn.readers:
            if reader.weight is None or reader.weight_spec is None:
                continue
            if not ctx.journal.apply(reader.weight, self.method, str(reader.weight_spec)):
                return
            try:
                if self.method == "nearest" or reader.groups > 1:
                    yield reader.weight, nearest(turn.scaled_weight(reader), reader.weight_spec)
                else:
                    yield from self._reconstructed(turn, reader, reader.weight, reader.weight_spec)
            except CalibrationError as error:
                raise CalibrationError(f"{reader.weight}: {error}") from error

    def _reconstructed(
        self, turn: Turn, reader: Reader, at: Site, spec: QuantSpec
    ) -> Iterator[tuple[Site, Entry]]:
        weight, bias = turn.scaled_weight(reader), turn.bias(reader)
        rows = turn.rows(reader, self.rows)
        felt = turn.table.get(Site(reader.site.at, "out"), Sensitivity)
        found = reconstruct(
            Reconstruction(
                given=turn.deployed(reader, rows),
                wanted=rows.real.double() @ turn.weight(reader).flatten(1).double().T,
                weight=weight,
                spec=spec,
                damping=self.damping,
                asymmetric=self.asymmetric,
                importance=None if felt is None else felt.of(rows.timestep),
                metric=None if felt is None else felt.metric,
            )
        )
        yield at, Codes(pack(found.codes, spec.bits), tuple(weight.shape), found.params, nearest=False)
        offset = found.offset.to(weight.dtype)
        yield Site(reader.site.at, "bias"), Bias(offset if bias is None else bias + offset)


def nearest(weight: Tensor, spec: QuantSpec) -> Codes:
    """The nearest codes in the searched range.

    Shapes: weight [O, ...], one scale per output channel or one in all.
    """
    params = search_range(weight, spec)
    codes = quantize(
        weight, params.scale, params.zero_point, None, params.axis or 0, params.qmin, params.qmax
    )
    return Codes(pack(codes, spec.bits), tuple(weight.shape), params)
