"""insert-qdq: quantize and dequantize every planned site. The only pass that loses information."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from dmqfx.errors import RewriteError
from dmqfx.graph import ops
from dmqfx.graph.address import Address, Site
from dmqfx.graph.channelwise import divisor
from dmqfx.graph.facts import FITTED, LEARNED, PLANNED, QDQ, ROUNDED, SHIFTED, Fact
from dmqfx.graph.pipeline import Pass, PassContext, Preserves
from dmqfx.graph.program import Program
from dmqfx.graph.rewrite import Rewriter
from dmqfx.graph.sites import channel_axis_of, is_weight
from dmqfx.graph.table import Bias, Codes, Planned, Range, Shift, Table
from dmqfx.graph.timesteps import GroupIndex
from dmqfx.numbers.quant import QParams, QuantSpec, params_from_range
from dmqfx.runtime.operators import OPS
from dmqfx.sweep.deploy import pending_scales


@dataclass(frozen=True)
class InsertQdq(Pass):
    """w  ->  dequantize(unpack(codes));  x  ->  dequantize(quantize(x)).

    A division by an equivalent scale gamma in front of a quantize joins its step: quantize(x / gamma, s)
    is quantize(x, gamma * s), and the integer product never sees gamma. Shifted channels are quantized in
    their own steps, s / 2^D * 2^e, and the integer product sees the shift e alone. Sites that read one tensor
    with one set of parameters share the quantize. Activations become QParams entries of the table. Scales that
    were learned have to be in the graph: apply-scaling puts them there.
    """

    requires: ClassVar[frozenset[Fact]] = frozenset({PLANNED, ROUNDED})
    provides: ClassVar[frozenset[Fact]] = frozenset({QDQ})
    forbids: ClassVar[frozenset[Fact]] = frozenset({QDQ, LEARNED})
    preserves: ClassVar[Preserves] = Preserves.LOSSY

    def run(self, program: Program, ctx: PassContext) -> Program:
        """Weights from their Codes, activations from their Range.

        Raises: RewriteError for a planned site without codes or range, or with a scale that is not in the graph.
        """
        rw = Rewriter(program, self.name(), ctx.journal)
        table = _current(program)
        self._check(program, table)
        activations = _Activations(rw)
        for site, planned in table.of(Planned).items():
            if planned.spec is None or not ctx.journal.apply(site, "qdq", str(planned.spec)):
                continue
            codes = table.get(site, Codes)
            if codes is not None:
                _weight(rw, site, codes, planned.spec)
                _bias(rw, site.at, table.get(Site(site.at, "bias"), Bias))
            elif (params := _params(table, site, planned.spec)) is not None:
                activations.quantize(site, params, table.get(site, Shift))
                table = table.put(site, params)
        return rw.finish().with_table(table)

    def _check(self, program: Program, table: Table) -> None:
        for site in pending_scales(program, table):
            what = "its equivalent scale is learned, and nobody applied it; run apply-scaling before"
            raise RewriteError(f"insert-qdq: {site}: {what}")
        for site, planned in table.of(Planned).items():
            if planned.spec is None:
                continue
            known = table.get(site, Codes) if is_weight(site) else _params(table, site, planned.spec)
            if known is None:
                what = (
                    "codes; run round-weights"
                    if is_weight(site)
                    else "range; run fit-ranges or freeze-observers"
                )
                raise RewriteError(f"insert-qdq: {site} is planned but has no {what} before")


def _current(program: Program) -> Table:
    """The table without what no fact stands behind any more: parameters of a tensor that was scaled since."""
    table = program.table
    if FITTED not in program.facts:
        table = table.drop_all(QParams)
    return table if {FITTED, SHIFTED} <= program.facts else table.drop_all(Shift)


def _params(table: Table, site: Site, spec: QuantSpec) -> QParams | None:
    """What was fitted to an activation, or else what reaches over the range that was observed."""
    fitted, seen = table.get(site, QParams), table.get(site, Range)
    if fitted is not None or seen is None:
        return fitted
    return params_from_range(seen.low, seen.high, spec, seen.axis)


def _bias(rw: Rewriter, at: Address, corrected: Bias | None) -> None:
    """A layer's bias is replaced where the rounding of its weight came with another one."""
    if corrected is None:
        return
    node = rw.node(at)
    with rw.before(node):
        rw.replace(node, rw.like(node, bias=corrected.value))


def _weight(rw: Rewriter, site: Site, codes: Codes, spec: QuantSpec) -> None:
    node = rw.node(site.at)
    name = f"{site.at.path}.weight".lstrip(".")
    params = codes.qparams
    with rw.before(node):
        packed = rw.constant(f"{name}_packed", codes.packed)
        unpacked = rw.call(
            OPS.unpack.default,
            near=node,
            packed=packed,
            bits=spec.bits,
            signed=params.qmin < 0,
            shape=list(codes.shape),
        )
        real = rw.call(
            OPS.dequantize.default,
            near=node,
            codes=unpacked,
            scale=rw.constant(f"{name}_scale", params.scale),
            zero_point=rw.constant(f"{name}_zero_point", params.zero_point),
            axis=0,
        )
        rw.replace(node, rw.like(node, weight=real))


class _Activations:
    """Quantize nodes made so far: sites that read one value with equal parameters share one."""

    def __init__(self, rw: Rewriter) -> None:
        self.rw, self.groups = rw, GroupIndex(rw)
        self.made: dict[fx.Node, list[tuple[QParams, Shift | None, fx.Node]]] = {}

    def quantize(self, site: Site, params: QParams, shift: Shift | None) -> None:
        """Put quantize and dequantize in front of one site."""
        reader = self.rw.node(site.at)
        x = ops.tensor(reader, site.arg)
        alike = (
            node
            for known, steps, node in self.made.get(x, [])
            if _equal(known, params) and _alike(steps, shift)
        )
        real = next(alike, None)
        if real is None:
            real = self._insert(site, x, reader, params, shift)
            self.made.setdefault(x, []).append((params, shift, real))
        self.rw.redirect(reader, x, real)

    def _insert(
        self, site: Site, x: fx.Node, reader: fx.Node, params: QParams, shift: Shift | None
    ) -> fx.Node:
        rw, axis = self.rw, params.axis if params.axis is not None else 1
        group = self.groups.node(params.boundaries, reader)
        first = min((user for user in x.users), key=list(rw.graph.nodes).index)
        stem = f"{site.at.path}.{site.arg}".lstrip(".")
        with rw.before(first):
            scale, zero_point = (
                rw.constant(f"{stem}_{k}", value)
                for k, value in (("scale", _finest(params, shift)), ("zero_point", params.zero_point))
            )
            source, step, step_axis, exponent = x, params.scale, axis, None
            if shift is not None:
                axis = step_axis = channel_axis_of(reader, site.arg)
                step = step * shift.factor.to(step)
                exponent = rw.constant(f"{stem}_shift", shift.exponent)
            if (division := divisor(x)) is not None:
                source, gamma, step_axis = division
                step = step * rw.value(gamma).flatten().to(step)
            steps = scale if step is params.scale else rw.constant(f"{stem}_step", step)
            codes = rw.call(
                OPS.quantize.default, near=reader, x=source, scale=steps, zero_point=zero_point, group=group,
                axis=step_axis, qmin=params.qmin, qmax=params.qmax,
            )  # fmt: skip
            return rw.call(
                OPS.dequantize.default, near=reader, codes=codes, scale=scale, zero_point=zero_point,
                group=group, axis=axis, shift=exponent,
            )  # fmt: skip


def _finest(params: QParams, shift: Shift | None) -> Tensor:
    """The step of which all others are a power of two."""
    return params.scale if shift is None else params.scale / 2**shift.largest


def _equal(a: QParams, b: QParams) -> bool:
    same = (a.qmin, a.qmax, a.axis, a.boundaries) == (b.qmin, b.qmax, b.axis, b.boundaries)
    return same and torch.equal(a.scale, b.scale) and torch.equal(a.zero_point, b.zero_point)


def _alike(a: Shift | None, b: Shift | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.largest == b.largest and torch.equal(a.exponent, b.exponent)
