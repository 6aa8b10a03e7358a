"""A judge of attention in codes: near attention in float, and all else as it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx

from dmqfx.checking.judges import CLOSE, Finding, Inputs, Judge, distance
from dmqfx.checking.probes import outputs, unobserved
from dmqfx.graph import ops
from dmqfx.graph.program import Program
from dmqfx.seeing.bits import RUN_TIME

__all__ = ["Attended"]


class Attended(Judge):
    """Attention in codes is near attention of its operands, and the rest is as before.

    How near it must be is measured by plain arithmetic: attention of operands that were rounded to codes of the same bits.
    Of scores in the hundreds a rounding picks other keys, and that is not told from a mistake.
    """

    def __init__(self, before: Program, probes: Sequence[Inputs]) -> None:
        self.before, self.probes, self.limit = before, probes, CLOSE[before.dtype]

    def judge(self, after: Program) -> Finding:
        worst = Finding(0.0, self.limit, "error of attention")
        for k, inputs in enumerate(self.probes):
            attending = _Attending(self.before, {n.meta["address"]: n for n in after.calls(*RUN_TIME)})
            with torch.no_grad():
                result = attending.run(*(inputs[i.name] for i in self.before.inputs.inputs))
            for at, (error, limit) in attending.errors.items():
                if not error <= limit:
                    return Finding(error, limit, f"relative L2 error of attention, probe {k + 1}", at)
            expected = result if isinstance(result, tuple) else (result,)
            for name, a, b in zip(after.inputs.outputs, outputs(after, inputs), expected, strict=True):
                what = f"relative L2 error of {name}, probe {k + 1}"
                worst = (
                    finding
                    if not (finding := Finding(distance(a, b), self.limit, what)).error <= worst.error
                    else worst
                )
        return worst


class _Attending(fx.Interpreter):
    """Runs a program whose attention at some addresses is that of other operations, and measures their errors."""

    def __init__(self, program: Program, others: Mapping[object, fx.Node]) -> None:
        super().__init__(unobserved(program))
        self.others = others
        self.errors: dict[str, tuple[float, float]] = {}

    def run_node(self, n: fx.Node) -> object:
        value, other = super().run_node(n), self.others.get(n.meta.get("address"))
        if other is None or not isinstance(value, Tensor):
            return value
        named = ops.args(other)
        operands = {arg: self.env[ops.tensor(n, arg)] for arg in ("query", "key", "value")}
        found: Tensor = other.target(**{**named, **operands})  # type: ignore[operator]  # a call
        rounded = dict(zip(operands, map(_rounded, operands.values()), strict=True))
        near = n.target(**{**ops.args(n), **rounded})  # type: ignore[operator]  # a call
        self.errors[str(n.meta["address"])] = (distance(found, value), 0.06 + 3 * distance(near, value))
        return found


def _rounded(x: Tensor) -> Tensor:
    """On a symmetric grid of 8 bits, of each head."""
    if x.numel() == 0:
        return x
    step = x.abs().amax((-2, -1), keepdim=True).clamp(min=torch.finfo(x.dtype).tiny) / 127
    return (x / step).round() * step
