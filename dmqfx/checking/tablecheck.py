"""What the table claims, held against the graph and the constants; nothing is run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from dmqfx.checking.faked import steps, unpacked
from dmqfx.checking.grids import HALF_STEP, activation_claims, grid_claims, scale_claims
from dmqfx.checking.stepclaims import arm_claims, shift_claims
from dmqfx.checking.structure import pair_claims, skip_claims
from dmqfx.graph import ops
from dmqfx.graph.address import Site
from dmqfx.graph.facts import CALIBRATED, INTEGER, OBSERVED, PLANNED, QDQ, ROUNDED
from dmqfx.graph.hoisting import misplaced
from dmqfx.graph.modules import constant, label
from dmqfx.graph.program import Program
from dmqfx.graph.sites import CHANNEL_AXIS, channel_axis, is_weight, unplanned, without_codes, without_range
from dmqfx.graph.table import (
    Bias,
    ChannelScale,
    Codes,
    LayerPair,
    Planned,
    Range,
    Sensitivity,
    Shift,
    SkipArm,
    SkipConcat,
)
from dmqfx.numbers.observers import Observer
from dmqfx.numbers.quant import QParams, QuantSpec
from dmqfx.sweep.deploy import scaled_weight

__all__ = ["Broken", "broken_claims"]

_FARTHEST = 0.5  # share of a row's norm; another row's codes, or a sign, move it by more than all of it


@dataclass(frozen=True)
class Broken:
    """An entry of the table (or its absence) that the program contradicts."""

    site: Site
    kind: str
    reason: str


def broken_claims(program: Program) -> Iterator[Broken]:
    """Every claim of the table that does not hold."""
    yield from _missing(program)
    yield from _misplaced(program)
    if OBSERVED in program.facts:
        yield from _unobserved(program)
    for site, entry in program.table:
        for reason in _against(program, site, entry):
            yield Broken(site, type(entry).__name__, reason)


def _misplaced(program: Program) -> Iterator[Broken]:
    """Hoisted values that depend on more than they say."""
    for mark, why in misplaced(program.graph):
        yield Broken(Site(ops.tensor(mark, "x").meta["address"], "out"), "hoisted value", why)


def _missing(program: Program) -> Iterator[Broken]:
    """Sites without the entry that a fact promises."""
    if PLANNED in program.facts and INTEGER not in program.facts:
        yield from (Broken(site, "Planned", "the site is not in the plan") for site in unplanned(program))
    for fact, kind, sites in ((CALIBRATED, "Range", without_range), (ROUNDED, "Codes", without_codes)):
        if fact in program.facts:
            reason = f"the site is planned, but there is no {kind}"
            yield from (Broken(site, kind, reason) for site in sites(program))


def _unobserved(program: Program) -> Iterator[Broken]:
    """Planned activation sites that no observer, or one for other groups or channels, looks at."""
    for site, planned in program.table.of(Planned).items():
        if planned.spec is None or is_weight(site):
            continue
        node = program.source(site)
        observer = program.gm.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not isinstance(observer, Observer):
            yield Broken(site, "Observer", f"the site reads {label(node)}, not an observer")
            continue
        edges = planned.spec.boundaries
        if observer.boundaries != edges or observer.axis != channel_axis(program, site):
            seen = f"boundaries {observer.boundaries} on axis {observer.axis}"
            yield Broken(site, "Observer", f"it has {seen}, the plan has {edges}")
        elif edges and _edges(program, node.args[-1]) != _as_held(edges, program.dtype):
            yield Broken(
                site, "Observer", "its group index is not made from the timestep and the plan's boundaries"
            )


def _edges(program: Program, group: fx.node.Argument) -> tuple[float, ...] | None:
    """The boundaries from which a group index is made, or None if it is not one."""
    if not isinstance(group, fx.Node) or not ops.is_call(group, "timestep_group"):
        return None
    timestep, edges = (ops.tensor(group, arg) for arg in ("timestep", "boundaries"))
    if timestep.target != "timestep" or edges.op != "get_attr":
        return None
    return tuple(constant(program.gm, str(edges.target)).tolist())


def _as_held(edges: tuple[float, ...], dtype: torch.dtype) -> tuple[float, ...]:
    """The nearest numbers to the plan's edges that the timestep's dtype has."""
    return tuple(torch.tensor(edges, dtype=dtype).tolist())


def _against(program: Program, site: Site, entry: object) -> Iterator[str]:
    """What speaks against one entry."""
    match entry:
        case Planned():
            return _planned(site, entry)
        case Range():
            return _range(program, site, entry)
        case SkipConcat():
            return skip_claims(program, site, entry)
        case SkipArm():
            return arm_claims(program, site, entry)
        case Shift():
            return shift_claims(program, site, entry)
        case LayerPair():
            return pair_claims(program, site, entry)
        case ChannelScale():
            return _scale(program, site, entry)
        case Codes():
            return _codes(program, site, entry)
        case Bias():
            return _bias(program, site, entry)
        case Sensitivity():
            return _sensitivity(program, site, entry)
        case QParams():
            return activation_claims(program, site, entry)
    return iter(())


def _planned(site: Site, entry: Planned) -> Iterator[str]:
    spec = entry.spec
    if spec is None:
        return
    least = 2 if is_weight(site) else 4
    if not least <= spec.bits <= 8:
        yield f"{spec.bits} bits are not in {least} to 8"
    if list(spec.boundaries) != sorted(set(spec.boundaries)):
        yield f"the boundaries {spec.boundaries} do not ascend"
    if is_weight(site) and spec.boundaries:
        yield "a weight cannot have timestep groups"


def _range(program: Program, site: Site, entry: Range) -> Iterator[str]:
    shape = (len(entry.boundaries) + 1, entry.low.shape[-1])
    if any(tuple(t.shape) != shape for t in (entry.low, entry.high, entry.mean, entry.variance)):
        yield f"low, high, mean and variance are not all {list(shape)}"
        return
    if entry.count.shape != shape[:1]:
        yield f"count is {list(entry.count.shape)}, not one number for each of {shape[0]} groups"
    if not all(bool(torch.isfinite(t).all()) for t in (entry.low, entry.high, entry.mean, entry.variance)):
        yield "a bound, mean or variance is not finite"
    if bool((entry.low > entry.high).any()):
        yield "a low bound lies above its high bound"
    if bool((entry.variance < 0).any()):
        yield "a variance is negative"
    planned = program.table.get(site, Planned)
    if planned is not None and planned.spec is not None and planned.spec.boundaries != entry.boundaries:
        yield f"its boundaries {entry.boundaries} are not the plan's {planned.spec.boundaries}"
    channels = _channels(program, site)
    if channels is not None and (entry.axis, shape[1]) != channels:
        yield f"{shape[1]} channels on axis {entry.axis}, the tensor has {channels[1]} on axis {channels[0]}"


def _scale(program: Program, site: Site, entry: ChannelScale) -> Iterator[str]:
    gamma = entry.gamma
    if not bool((torch.isfinite(gamma) & (gamma > 0)).all()):
        yield "gamma is not finite and positive everywhere"
    channels = _channels(program, site)
    if channels is not None and tuple(gamma.shape) != (channels[1],):
        yield f"gamma is {list(gamma.shape)}, but the tensor has {channels[1]} channels"
    if program.table.get(site, LayerPair) is None:
        yield "no pair of layers stands behind the scale"


def _sensitivity(program: Program, site: Site, entry: Sensitivity) -> Iterator[str]:
    rows = program.node(site.at).meta["val"].shape[CHANNEL_AXIS[site.at.op]]  # of an integer layer too
    if tuple(entry.weight.shape) != (len(entry.boundaries) + 1,):
        yield f"{list(entry.weight.shape)} weights for {len(entry.boundaries) + 1} timestep groups"
    elif not bool((torch.isfinite(entry.weight) & (entry.weight >= 0)).all()):
        yield "a weight is negative or not finite"
    metric = entry.metric
    if metric is None:
        return
    if tuple(metric.shape) != (rows, rows):
        yield f"the metric is {list(metric.shape)}, the layer has {rows} output channels"
    elif not bool(torch.isfinite(metric).all()) or not torch.allclose(metric, metric.T, rtol=1e-3):
        yield "the metric is not finite and symmetric"
    elif bool((metric.abs() > (metric.diagonal().outer(metric.diagonal())).sqrt() * 1.01).any()):
        yield "the metric is not positive semidefinite"


def _bias(program: Program, site: Site, entry: Bias) -> Iterator[str]:
    node = program.node(site.at)
    rows = node.meta["val"].shape[CHANNEL_AXIS[site.at.op]]  # of an integer layer too
    if tuple(entry.value.shape) != (rows,):
        yield f"the bias is {list(entry.value.shape)}, the layer has {rows} output channels"
    elif not bool(torch.isfinite(entry.value).all()):
        yield "the bias is not finite"
    elif QDQ in program.facts and INTEGER not in program.facts:
        there = ops.args(node).get("bias")
        fixed = isinstance(there, fx.Node) and there.op == "get_attr"
        value = constant(program.gm, str(there.target)) if fixed and isinstance(there, fx.Node) else None
        if value is None or not torch.equal(value.cpu(), entry.value.cpu()):
            yield f"the layer has {'no' if value is None else 'another'} bias"


def _codes(program: Program, site: Site, entry: Codes) -> Iterator[str]:
    params, planned = entry.qparams, program.table.get(site, Planned)
    if planned is None or planned.spec is None:
        yield "the weight is not planned to be quantized"
        return
    rows = entry.shape[0]
    reasons = list(grid_claims(params, planned.spec, 1, rows if planned.spec.per == "channel" else 1))
    yield from reasons
    count = torch.Size(entry.shape).numel()
    size = -(-count // 2) if planned.spec.bits <= 4 else count
    if entry.packed.dtype != torch.uint8 or entry.packed.numel() != size:
        wanted = f"{list(entry.shape)} codes of {planned.spec.bits} bits take {size} bytes"
        yield f"{wanted}, not {entry.packed.numel()} of {entry.packed.dtype}"
        return
    codes = unpacked(entry, planned.spec.bits)
    if not params.qmin <= int(codes.min()) <= int(codes.max()) <= params.qmax:
        yield f"codes from {int(codes.min())} to {int(codes.max())} are not in {params.qmin} to {params.qmax}"
    if not reasons and ROUNDED in program.facts and not {QDQ, INTEGER} & program.facts:
        weight = scaled_weight(program, site)
        if entry.nearest:
            yield from scale_claims(weight, params, planned.spec)
            yield from _rounding(weight, codes, params, planned.spec)
        else:
            yield from _learned(weight, codes, params, entry.adjacent)


def _rounding(weight: Tensor, codes: Tensor, params: QParams, spec: QuantSpec) -> Iterator[str]:
    """Whether each code is the nearest one to the weight as it stands in the graph now."""
    if weight.shape != codes.shape:
        yield f"codes are {list(codes.shape)}, the weight is {list(weight.shape)}"
        return
    exact = steps(weight, QParams(params.scale, params.zero_point, params.qmin, params.qmax, 0), None)
    inside = exact.clamp(params.qmin, params.qmax)
    clipped = (exact - inside).abs().flatten(1).amax(1)
    off = (codes - inside).abs().flatten(1).amax(1)
    if float(off.max()) > HALF_STEP:
        row = int(off.argmax())
        yield f"output channel {row} is rounded by {float(off[row]):.3g} steps, not to the nearest code"
    if spec.range == "minmax" and float(clipped.max()) > HALF_STEP:
        row = int(clipped.argmax())
        yield f"output channel {row} is clipped by {float(clipped[row]):.3g} steps; minmax clips nothing"


def _learned(weight: Tensor, codes: Tensor, params: QParams, adjacent: bool) -> Iterator[str]:
    """Whether codes that were moved from the nearest ones still spell the weight, or are the next ones to it."""
    if weight.shape != codes.shape:
        yield f"codes are {list(codes.shape)}, the weight is {list(weight.shape)}"
        return
    grid = QParams(params.scale, params.zero_point, params.qmin, params.qmax, 0)
    exact = steps(weight, grid, None)
    if adjacent:
        off = (codes - exact.clamp(params.qmin, params.qmax)).abs().flatten(1).amax(1)
        if float(off.max()) > 2 * HALF_STEP:
            row = int(off.argmax())
            yield f"output channel {row} is rounded by {float(off[row]):.3g} steps, past the next code"
        return
    centred = exact.double().flatten(1) - params.zero_point.double().T
    moved = (codes.double() - exact.double()).flatten(1).square().sum(1)
    allowed = _FARTHEST**2 * centred.square().sum(1) + exact[0].numel()
    if bool((moved > allowed).any()):
        row = int((moved / allowed).argmax())
        share = float((moved[row] / centred[row].square().sum().clamp(min=1)).sqrt())
        yield f"output channel {row} was moved by {share:.0%} of its weights, more than rounding may"


def _channels(program: Program, site: Site) -> tuple[int, int] | None:
    """(axis, number) of the channels that arrive at a site, or None where the graph no longer has it."""
    node = program.node(site.at)
    source = ops.args(node).get(site.arg)
    if ops.name(node) not in CHANNEL_AXIS or not isinstance(source, fx.Node):
        return None
    axis = channel_axis(program, site)
    return axis, source.meta["val"].shape[axis]
