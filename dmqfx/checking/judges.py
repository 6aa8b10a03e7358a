"""Judges: each holds what a program did before a pass, and says of a program after it how far it is off."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from dmqfx.checking.faked import Faked, arguments, expand, near_tie
from dmqfx.checking.probes import outputs, unobserved
from dmqfx.graph import ops
from dmqfx.graph.program import Program
from dmqfx.graph.table import Planned
from dmqfx.numbers.quant import QParams
from dmqfx.seeing.bits import RUN_TIME

__all__ = ["CLOSE", "Close", "Equal", "Finding", "Judge", "Planlike", "SameCodes", "Signal", "Together"]

Inputs = Mapping[str, Tensor]

CLOSE: Mapping[torch.dtype, float] = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}
"""Largest relative L2 error of an exact rewrite, by the dtype that it computed in."""

TIE: Mapping[torch.dtype, float] = {torch.float64: 1e-9, torch.float32: 1e-4}
"""How near a number must be to the middle of two codes for either to be right, relative to the code."""

SHARE_OF_TIES: Mapping[torch.dtype, float] = {torch.float64: 1e-6, torch.float32: 1e-4}
FEW_TIES: Mapping[torch.dtype, int] = {torch.float64: 1, torch.float32: 8}
"""Share of codes that may differ, all at ties, and how many may whatever their share is; no limit in narrow dtypes."""


@dataclass(frozen=True)
class Finding:
    """How far off `what` was, and how far it may be; `at` is where, if that is the culprit."""

    error: float
    limit: float
    what: str
    at: str = ""

    @property
    def wrong(self) -> bool:
        """Whether the error exceeds the limit or is not a number."""
        return not self.error <= self.limit


class Judge(ABC):
    """Made from the program before a pass, before the pass runs; asked about any program after it."""

    probes: Sequence[Inputs]

    @abstractmethod
    def judge(self, after: Program) -> Finding:
        """The worst finding."""


class Together(Judge):
    """Several judges who look at the same probes: the first wrong finding, or else the first of all."""

    def __init__(self, judges: Sequence[Judge]) -> None:
        self.judges, self.probes = judges, judges[0].probes

    def judge(self, after: Program) -> Finding:
        found = []
        for each in self.judges:
            found.append(each.judge(after))
            if found[-1].wrong:
                return found[-1]
        return found[0]


class Equal(Judge):
    """The same outputs, bit for bit."""

    def __init__(self, before: Program, probes: Sequence[Inputs]) -> None:
        self.probes = probes
        self.expected = [outputs(before, inputs) for inputs in probes]
        self.names = before.inputs.outputs

    def judge(self, after: Program) -> Finding:
        worst = Finding(0.0, 0.0, "difference of the outputs")
        for k, (inputs, expected) in enumerate(zip(self.probes, self.expected, strict=True)):
            for name, a, b in zip(self.names, outputs(after, inputs), expected, strict=True):
                if not _same_bits(a, b):
                    error = max(distance(a, b), torch.finfo(torch.float64).tiny)
                    worst = _worse(
                        worst, Finding(error, 0.0, f"relative L2 error of {name}, {_probe(k, inputs)}")
                    )
        return worst


class Close(Judge):
    """Outputs within a relative L2 error."""

    def __init__(self, before: Program, probes: Sequence[Inputs]) -> None:
        self.probes, self.limit = probes, CLOSE[before.dtype]
        self.expected = [outputs(before, inputs) for inputs in probes]
        self.names = before.inputs.outputs

    def judge(self, after: Program) -> Finding:
        worst = Finding(0.0, self.limit, "relative L2 error of the outputs")
        for k, (inputs, expected) in enumerate(zip(self.probes, self.expected, strict=True)):
            for name, a, b in zip(self.names, outputs(after, inputs), expected, strict=True):
                what = f"relative L2 error of {name}, {_probe(k, inputs)}"
                worst = _worse(worst, Finding(distance(a, b), self.limit, what))
        return worst


class Signal(Judge):
    """Finite outputs; the error is the noise of quantization, limited by a floor on the SQNR.

    Units: floor in dB.
    """

    def __init__(self, before: Program, probes: Sequence[Inputs], floor: float | None) -> None:
        self.probes = probes
        self.limit = math.inf if floor is None else 10 ** (-floor / 20)
        self.expected = [torch.cat([v.flatten() for v in outputs(before, inputs)]) for inputs in probes]

    def judge(self, after: Program) -> Finding:
        got = [torch.cat([v.flatten() for v in outputs(after, inputs)]) for inputs in self.probes]
        if not all(bool(torch.isfinite(values).all()) for values in got):
            return Finding(math.nan, self.limit, "an output that is not finite")
        return Finding(
            distance(torch.cat(got), torch.cat(self.expected)), self.limit, "noise over signal of the outputs"
        )


class Planlike(Judge):
    """Every planned site gets what the plan says, as a second opinion computes it; the rest is as before."""

    def __init__(self, before: Program, probes: Sequence[Inputs]) -> None:
        self.before, self.probes, self.limit = before, probes, CLOSE[before.dtype]

    def judge(self, after: Program) -> Finding:
        worst = Finding(0.0, self.limit, "error of the planned sites")
        params = after.table.of(QParams)
        sites = set(self.before.table.of(Planned))
        for k, inputs in enumerate(self.probes):
            faked = Faked(self.before, params, arguments(after, inputs, sites), TIE[self.before.dtype])
            with torch.no_grad():
                result = faked.run(*(inputs[i.name] for i in self.before.inputs.inputs))
            expected = result if isinstance(result, tuple) else (result,)
            for site, error in faked.errors.items():
                if not error <= self.limit:
                    what = f"relative L2 error of what arrives at {site}, {_probe(k, inputs)}"
                    return Finding(error, self.limit, what, str(site.at))
            for name, a, b in zip(after.inputs.outputs, outputs(after, inputs), expected, strict=True):
                what = f"relative L2 error of {name}, {_probe(k, inputs)}"
                worst = _worse(worst, Finding(distance(a, b), self.limit, what))
        return worst


class SameCodes(Judge):
    """The same integers at every quantize but for ties, and close outputs.

    Each quantize goes on with the codes of before, so that a tie does not spread; so does attention that makes codes of
    its operands itself, which must make the same result of the same operands. `ties` has, for each probe that was judged,
    how many codes differ and how many there are.
    """

    ties: list[tuple[int, int]]

    def __init__(self, before: Program, probes: Sequence[Inputs]) -> None:
        self.probes, self.dtype = probes, before.dtype
        self.expected: list[tuple[_Recorded, tuple[Tensor, ...]]] = []
        for inputs in probes:
            run = _Recorded(before)
            with torch.no_grad():
                result = run.run(*(inputs[i.name] for i in before.inputs.inputs))
            self.expected.append((run, result if isinstance(result, tuple) else (result,)))

    def judge(self, after: Program) -> Finding:
        worst, self.ties = Finding(0.0, CLOSE[self.dtype], "relative L2 error of the outputs"), []
        for k, (inputs, (was, expected)) in enumerate(zip(self.probes, self.expected, strict=True)):
            forced = _Forced(after, was, TIE.get(self.dtype, 1e-2), CLOSE[self.dtype])
            with torch.no_grad():
                result = forced.run(*(inputs[i.name] for i in after.inputs.inputs))
            if forced.wrong:
                where, share = forced.wrong[0]
                what = f"share of other codes at {where}, {_probe(k, inputs)}"
                return Finding(share, 0.0, what)
            share = forced.ties / max(forced.count, 1)
            self.ties.append((forced.ties, forced.count))
            most = SHARE_OF_TIES.get(self.dtype, 1.0)
            if share > most and forced.ties > FEW_TIES[self.dtype]:
                return Finding(share, most, f"share of codes that differ, {_probe(k, inputs)}")
            got = result if isinstance(result, tuple) else (result,)
            for name, a, b in zip(after.inputs.outputs, got, expected, strict=True):
                what = f"relative L2 error of {name}, {_probe(k, inputs)}"
                worst = _worse(worst, Finding(distance(a, b), CLOSE[self.dtype], what))
        return worst


@dataclass(frozen=True, eq=False)
class _Coded:
    """Codes of one quantize and the numbers that it rounded, in code units."""

    codes: Tensor
    before_rounding: Tensor


_Attention = tuple[Mapping[str, Tensor], Tensor]
"""Operands and result."""


class _Recorded(fx.Interpreter):
    """Runs a program and keeps what every quantize makes, and attention that makes codes itself."""

    def __init__(self, program: Program) -> None:
        super().__init__(unobserved(program))
        self.found: dict[object, _Coded] = {}
        self.attended: dict[object, _Attention] = {}

    def run_node(self, n: fx.Node) -> object:
        value = super().run_node(n)
        if ops.is_call(n, "quantize") and isinstance(value, Tensor):
            x, scale, zero_point = (self.env[ops.tensor(n, arg)] for arg in ("x", "scale", "zero_point"))
            group, axis = (ops.args(n)[arg] for arg in ("group", "axis"))
            rows = self.env[group] if isinstance(group, fx.Node) else None
            channels = axis if isinstance(axis, int) else 0
            spread = [expand(parameter, rows, channels, x.dim()) for parameter in (scale, zero_point)]
            self.found[n.meta["address"]] = _Coded(value, x.double() / spread[0] + spread[1])
        if ops.is_call(n, *RUN_TIME) and isinstance(value, Tensor):
            operands = {arg: self.env[ops.tensor(n, arg)] for arg in ("query", "key", "value")}
            self.attended[n.meta["address"]] = (operands, value)
        return value


class _Forced(fx.Interpreter):
    """Runs a program, compares its codes with recorded ones of the same address, and goes on with those."""

    def __init__(self, program: Program, was: _Recorded, tie: float, close: float) -> None:
        super().__init__(unobserved(program))
        self.codes, self.attended, self.tie, self.close = was.found, was.attended, tie, close
        self.wrong: list[tuple[str, float]] = []
        self.ties = self.count = 0

    def run_node(self, n: fx.Node) -> object:
        value = super().run_node(n)
        if ops.is_call(n, *RUN_TIME) and n.meta["address"] in self.attended:
            return self._attended(n)
        known = self.codes.get(n.meta.get("address"))
        if known is None or not isinstance(value, Tensor) or value.is_floating_point():
            return value
        if value.shape != known.codes.shape:
            self.wrong.append((f"{n.meta['address']} (other shape)", math.inf))
            return value
        off = (value.double() - known.codes.double()).abs()
        differ = off > 0
        self.count += off.numel()
        self.ties += int(differ.sum())
        if bool((differ & ~near_tie(known.before_rounding, self.tie)).any()) or bool((off > 1).any()):
            how = f"{int(differ.sum())} of {off.numel()} differ, by up to {int(off.max())}"
            self.wrong.append((f"{n.meta['address']} ({how})", float(differ.double().mean())))
        return known.codes

    def _attended(self, n: fx.Node) -> Tensor:
        """The result of before, which must come of the operands of before, and these must still be what they were."""
        operands, result = self.attended[n.meta["address"]]
        for arg, value in operands.items():
            if not (error := distance(self.env[ops.tensor(n, arg)], value)) <= self.close:
                self.wrong.append((f"{n.meta['address']} (another {arg})", error))
        again: Tensor = n.target(**{**ops.args(n), **operands})  # type: ignore[operator]  # a call
        if not _same_bits(again, result):
            self.wrong.append((f"{n.meta['address']} (another result)", distance(again, result)))
        return result


def distance(a: Tensor, b: Tensor) -> float:
    """Relative L2 distance of a from b; infinite where only one of them is finite."""
    if a.shape != b.shape or not torch.equal(torch.isfinite(a), torch.isfinite(b)):
        return math.inf
    finite = torch.isfinite(b)
    a, b = a[finite].double(), b[finite].double()
    return float((a - b).norm() / (b.norm() if bool(b.any()) else 1.0))


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return bool(torch.allclose(a, b, rtol=0.0, atol=0.0, equal_nan=True))


def _worse(a: Finding, b: Finding) -> Finding:
    return b if not b.error <= a.error else a


def _probe(k: int, inputs: Inputs) -> str:
    sample = inputs.get("sample")
    shape = "x".join(map(str, sample.shape)) if sample is not None else "?"
    return f"probe {k + 1} ({shape})"
