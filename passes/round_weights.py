"""round-weights: integer codes for every planned weight, in the table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor
from tqdm import tqdm

from dmqfx.errors import CalibrationError
from dmqfx.graph.address import Site
from dmqfx.graph.facts import PLANNED, ROUNDED, Fact
from dmqfx.graph.pipeline import Pass, PassContext, Preserves
from dmqfx.graph.program import Program
from dmqfx.graph.sites import is_weight
from dmqfx.graph.table import Codes, Planned
from dmqfx.numbers.packing import pack
from dmqfx.numbers.quant import QuantSpec, quantize
from dmqfx.numbers.ranges import search_range


@dataclass(frozen=True)
class RoundWeights(Pass):
    """Write Codes for every planned weight; the float weight stays in the graph until insert-qdq.

    Source: `nearest` rounds to the nearest code; ranges come from the policy (`range: minmax` or `mse`).
    """

    requires: ClassVar[frozenset[Fact]] = frozenset({PLANNED})
    provides: ClassVar[frozenset[Fact]] = frozenset({ROUNDED})
    preserves: ClassVar[Preserves] = Preserves.BITWISE
    method: Literal["nearest"] = "nearest"

    def run(self, program: Program, ctx: PassContext) -> Program:
        """Search the range, round, pack.

        Raises: CalibrationError naming the site of a weight that is not finite.
        """
        found: dict[Site, Codes] = {}
        planned = {
            s: p.spec for s, p in program.table.of(Planned).items() if is_weight(s) and p.spec is not None
        }
        for site, spec in tqdm(planned.items(), desc="round weights", unit="layer", disable=not ctx.progress):
            if not ctx.journal.apply(site, self.method, str(spec)):
                break
            try:
                found[site] = nearest(program.constant_at(site).detach(), spec)
            except CalibrationError as error:
                raise CalibrationError(f"{site}: {error}") from error
        return program.with_table(program.table.put_all(found))


def nearest(weight: Tensor, spec: QuantSpec) -> Codes:
    """The nearest codes in the searched range.

    Shapes: weight [O, ...], one scale per output channel or one in all.
    """
    params = search_range(weight, spec)
    codes = quantize(
        weight, params.scale, params.zero_point, None, params.axis or 0, params.qmin, params.qmax
    )
    return Codes(pack(codes, spec.bits), tuple(weight.shape), params)
