"""A second opinion on quantization: the plan carried out by plain arithmetic on the float program.

Shares no code with the operators and passes that it checks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, fx

from dmqfx.checking.probes import unobserved
from dmqfx.graph import ops
from dmqfx.graph.address import Site
from dmqfx.graph.program import Program
from dmqfx.graph.table import Bias, Codes, Planned, Shift
from dmqfx.numbers.quant import QParams

__all__ = [
    "Sites",
    "arguments",
    "expand",
    "fake",
    "group_of",
    "near_tie",
    "real",
    "shifted",
    "steps",
    "unpacked",
]

Sites = Mapping[Site, Tensor]


def group_of(timestep: Tensor, boundaries: tuple[float, ...]) -> Tensor:
    """How many boundaries lie at or below each timestep, both in the timestep's dtype.

    Shapes: timestep [B], result int64 [B].
    """
    edges = torch.tensor(boundaries, dtype=timestep.dtype, device=timestep.device)
    return (timestep[:, None] >= edges[None, :]).sum(1)


def expand(values: Tensor, group: Tensor | None, axis: int | None, dims: int) -> Tensor:
    """Parameters [G, C] against a tensor of `dims` dimensions: the batch first, channels on `axis`."""
    rows = values[:1] if group is None else values[group]
    shape = [rows.shape[0]] + [1] * (dims - 1)
    if values.shape[1] > 1:
        shape[axis or 0] = values.shape[1]
    return rows.reshape(shape).double()


def steps(x: Tensor, params: QParams, group: Tensor | None) -> Tensor:
    """x in codes before rounding, in float64."""
    dims = x.dim()
    return x.double() / expand(params.scale, group, params.axis, dims) + expand(
        params.zero_point, group, params.axis, dims
    )


def fake(x: Tensor, params: QParams, group: Tensor | None) -> Tensor:
    """The nearest number on the grid, in the dtype of x."""
    codes = steps(x, params, group).round().clamp(params.qmin, params.qmax)
    return real(codes, params, group).to(x.dtype)


def real(codes: Tensor, params: QParams, group: Tensor | None) -> Tensor:
    """(code - zero point) * scale, in float64."""
    dims = codes.dim()
    zero_point = expand(params.zero_point, group, params.axis, dims)
    return (codes.double() - zero_point) * expand(params.scale, group, params.axis, dims)


def shifted(params: QParams, shift: Shift, axis: int) -> QParams:
    """Parameters with a step for each channel on `axis`: the site's own, halved once for each exponent missing."""
    halvings = shift.largest - shift.exponent.double()
    return replace(params, scale=params.scale.double() * 0.5**halvings, axis=axis)


def near_tie(before_rounding: Tensor, tolerance: float) -> Tensor:
    """Where a number lies so near the middle of two codes that either is right."""
    distance = (before_rounding - before_rounding.floor() - 0.5).abs()
    return distance <= tolerance * before_rounding.abs().clamp(min=1)


def unpacked(codes: Codes, bits: int) -> Tensor:
    """The integers behind packed codes, in float64: two to a byte up to 4 bits, the first in the low half."""
    values = codes.packed.to(torch.int64).flatten()
    width = 4 if bits <= 4 else 8
    if width == 4:
        values = torch.stack([values % 16, values // 16], 1).flatten()
    if codes.qparams.qmin < 0:
        values = torch.where(values >= 2 ** (width - 1), values - 2**width, values)
    count = torch.Size(codes.shape).numel()
    return values[:count].reshape(codes.shape).double()


def arguments(program: Program, inputs: Mapping[str, Tensor], sites: set[Site]) -> dict[Site, Tensor]:
    """What arrives at the sites in one call; sites that the graph no longer has are left out."""
    watch = _Watch(program, sites)
    with torch.no_grad():
        watch.run(*(inputs[i.name] for i in program.inputs.inputs))
    return watch.found


class _Watch(fx.Interpreter):
    """Runs a fork of a program and notes what arrives at sites."""

    def __init__(self, program: Program, sites: set[Site]) -> None:
        super().__init__(unobserved(program))
        self.found: dict[Site, Tensor] = {}
        self._sites: dict[object, list[Site]] = {}
        for site in sites:
            self._sites.setdefault(site.at, []).append(site)

    def run_node(self, n: fx.Node) -> object:
        for site in self._sites.get(n.meta.get("address"), ()):
            source = ops.args(n).get(site.arg)
            if isinstance(source, fx.Node) and isinstance(self.env[source], Tensor):
                self.found[site] = self.env[source]
        return super().run_node(n)


class Faked(fx.Interpreter):
    """Runs a float program with its plan carried out; notes how far `got` is from what arrives at each site.

    Each site goes on with what was got, so that a difference is found where it is made and nowhere after.
    `params` are the activations' parameters; weights and biases come from the program's table.
    """

    def __init__(
        self, program: Program, params: Mapping[Site, QParams], got: Sites, tolerance: float
    ) -> None:
        super().__init__(unobserved(program))
        self.params, self.got, self.tolerance = params, got, tolerance
        self.errors: dict[Site, float] = {}
        self._table = program.table
        self._sites: dict[object, list[tuple[Site, Planned]]] = {}
        for site, planned in program.table.of(Planned).items():
            self._sites.setdefault(site.at, []).append((site, planned))
        self._timestep: Tensor | None = None

    def placeholder(self, target: fx.node.Target, args: object, kwargs: object) -> object:
        value = super().placeholder(target, args, kwargs)  # type: ignore[arg-type]  # passed on as they came
        if target == "timestep" and isinstance(value, Tensor):
            self._timestep = value
        return value

    def run_node(self, n: fx.Node) -> object:
        planned = {site.arg: (site, plan) for site, plan in self._sites.get(n.meta.get("address"), ())}
        if not planned:
            return super().run_node(n)
        args, kwargs = fx.node.map_arg((n.args, n.kwargs), lambda read: self.env[read])
        named = dict(zip(ops.parameters(n), args, strict=False))
        for arg, (site, plan) in planned.items():
            if isinstance(x := named.get(arg), Tensor):
                named[arg] = self._at(site, plan, x)
                if (bias := self._table.get(Site(site.at, "bias"), Bias)) is not None:
                    named["bias"] = bias.value.to(x)
        return self.call_function(n.target, tuple(named.values()), kwargs)

    def _at(self, site: Site, planned: Planned, x: Tensor) -> Tensor:
        """What should arrive at a site; its error is noted, and what was got goes on."""
        got = self.got.get(site)
        expected, free = self._expected(site, planned, x)
        if got is None or got.shape != x.shape:
            self.errors.update({site: math.inf} if got is not None else {})
            return expected
        close = torch.where(free, got.double(), expected.double())
        norm = float(expected.double().norm()) or 1.0
        self.errors[site] = (
            float((got.double() - close).norm()) / norm if got.shape == x.shape else float("inf")
        )
        return got

    def _expected(self, site: Site, planned: Planned, x: Tensor) -> tuple[Tensor, Tensor]:
        """The value of a site by the plan, and where it may be either neighbour because of a tie."""
        nowhere = torch.zeros(x.shape, dtype=torch.bool, device=x.device)
        if planned.spec is None:
            return x, nowhere
        codes = self._table.get(site, Codes)
        if codes is not None:
            return real(unpacked(codes, planned.spec.bits), _rows(codes.qparams), None).to(x.dtype), nowhere
        params = self.params.get(site)
        if params is None:
            return x, nowhere
        if (shift := self._table.get(site, Shift)) is not None:
            params = shifted(params, shift, 1 if site.at.op == "conv2d" else -1)
        group = None
        if params.boundaries and self._timestep is not None:
            group = group_of(self._timestep, params.boundaries)
        return fake(x, params, group), near_tie(steps(x, params, group), self.tolerance)


def _rows(params: QParams) -> QParams:
    """Parameters of a weight: its channels are rows."""
    return QParams(params.scale, params.zero_point, params.qmin, params.qmax, 0)
