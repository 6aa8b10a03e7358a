"""A judge of attention in codes: near attention in float, and all else as it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx

from dmqfx.checking.judges import CLOSE, Finding, Inputs, Judge, distance
from dmqfx.checking.probes import outputs, unobserved
from dmqfx.graph import ops
from dmqfx.graph.program import Program
from dmqfx.seeing.bits import KEY_BITS, RUN_TIME

__all__ = ["Attended"]


class Attended(Judge):
    """Attention in codes is near attention of its operands, and the rest is as before.

    How near it must be is measured by plain arithmetic: attention of operands that were rounded to as many bits. Of
    scores in the hundreds a rounding picks other keys, and that is not told from a mistake.

    Units: bits are those that were asked for, of queries and of the softmax.
    """

    def __init__(self, before: Program, probes: Sequence[Inputs], bits: int = 8) -> None:
        self.before, self.probes, self.bits, self.limit = before, probes, bits, CLOSE[before.dtype]

    def judge(self, after: Program) -> Finding:
        worst = Finding(0.0, self.limit, "error of attention")
        for k, inputs in enumerate(self.probes):
            attending = _Attending(
                self.before, {n.meta["address"]: n for n in after.calls(*RUN_TIME)}, self.bits
            )
            with torch.no_grad():
                result = attending.run(*(inputs[i.name] for i in self.before.inputs.inputs))
            for at, (error, limit) in attending.errors.items():
                if not error <= limit:
                    return Finding(error, limit, f"relative L2 error of attention, probe {k + 1}", at)
            expected = result if isinstance(result, tuple) else (result,)
            for name, a, b in zip(after.inputs.outputs, outputs(after, inputs), expected, strict=True):
                what = f"relative L2 error of {name}, probe {k + 1}"
                finding = Finding(distance(a, b), self.limit, what)
                worst = worst if finding.error <= worst.error else finding
        return worst


class _Attending(fx.Interpreter):
    """Runs a program whose attention at some addresses is that of other operations, and measures their errors."""

    def __init__(self, program: Program, others: Mapping[object, fx.Node], bits: int) -> None:
        super().__init__(unobserved(program))
        self.others, self.bits = others, bits
        self.errors: dict[str, tuple[float, float]] = {}

    def run_node(self, n: fx.Node) -> object:
        value, other = super().run_node(n), self.others.get(n.meta.get("address"))
        if other is None or not isinstance(value, Tensor):
            return value
        named = ops.args(other)
        operands = {arg: self.env[ops.tensor(n, arg)] for arg in ("query", "key", "value")}
        found: Tensor = other.target(**{**named, **operands})  # type: ignore[operator]  # a call
        bits = {"query": self.bits, "key": KEY_BITS, "value": KEY_BITS}
        rounded = {arg: _rounded(x, bits[arg]) for arg, x in operands.items()}
        near = n.target(**{**ops.args(n), **rounded})  # type: ignore[operator]  # a call
        self.errors[str(n.meta["address"])] = (
            distance(found, value),
            _limit(self.bits, distance(near, value)),
        )
        return found


def _limit(bits: int, near: float) -> float:
    """How far attention in codes may be off, where that of rounded operands is off by `near`: never by all of it."""
    return min(0.95, 0.06 * 2.0 ** (8 - bits) + 3 * near)


def _rounded(x: Tensor, bits: int) -> Tensor:
    """On a symmetric grid, of each head."""
    if x.numel() == 0:
        return x
    step = x.abs().amax((-2, -1), keepdim=True).clamp(min=torch.finfo(x.dtype).tiny) / (2 ** (bits - 1) - 1)
    rounded: Tensor = (x / step).round() * step
    return rounded
