"""What the table claims, held against the graph and the constants; nothing is run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from dmqfx.checking.faked import steps, unpacked
from dmqfx.checking.stepclaims import arm_claims, depth, shift_claims
from dmqfx.graph import ops
from dmqfx.graph.address import Site
from dmqfx.graph.facts import CALIBRATED, FITTED, INTEGER, OBSERVED, PLANNED, QDQ, ROUNDED
from dmqfx.graph.modules import constant, label
from dmqfx.graph.program import Program
from dmqfx.graph.sites import CHANNEL_AXIS, is_weight, readers
from dmqfx.graph.table import ChannelScale, Codes, LayerPair, Planned, Range, Shift, SkipArm, SkipConcat
from dmqfx.numbers.observers import Observer
from dmqfx.numbers.quant import QParams, QuantSpec
from dmqfx.policy.policy import KIND_OF_OPERATOR, OPERANDS
from dmqfx.sweep.deploy import pending_scale

__all__ = ["Broken", "broken_claims"]

_HALF_STEP = 0.5 + 1e-3


@dataclass(frozen=True)
class Broken:
    """An entry of the table (or its absence) that the program contradicts."""

    site: Site
    kind: str
    reason: str


def broken_claims(program: Program) -> Iterator[Broken]:
    """Every claim of the table that does not hold."""
    yield from _missing(program)
    if OBSERVED in program.facts:
        yield from _unobserved(program)
    for site, entry in program.table:
        for reason in _against(program, site, entry):
            yield Broken(site, type(entry).__name__, reason)


def _missing(program: Program) -> Iterator[Broken]:
    """Sites without the entry that a fact promises."""
    plan = program.table.of(Planned)
    if PLANNED in program.facts and INTEGER not in program.facts:
        for node in program.calls(*KIND_OF_OPERATOR):
            for arg in OPERANDS[KIND_OF_OPERATOR[ops.name(node)]]:
                if (site := Site(node.meta["address"], arg)) not in plan:
                    yield Broken(site, "Planned", "the site is not in the plan")
    for site, planned in plan.items():
        entry = program.table.get(site, Codes) if is_weight(site) else program.table.get(site, Range)
        fact = ROUNDED if is_weight(site) else CALIBRATED
        if planned.spec is not None and fact in program.facts and entry is None:
            kind = "Codes" if is_weight(site) else "Range"
            yield Broken(site, kind, f"the site is planned, but there is no {kind}")


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
        if observer.boundaries != edges or observer.axis != CHANNEL_AXIS[ops.name(program.node(site.at))]:
            seen = f"boundaries {observer.boundaries} on axis {observer.axis}"
            yield Broken(site, "Observer", f"it has {seen}, the plan has {edges}")
        elif edges and _edges(program, node.args[-1]) != edges:
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


def _against(program: Program, site: Site, entry: object) -> Iterator[str]:
    """What speaks against one entry."""
    match entry:
        case Planned():
            return _planned(site, entry)
        case Range():
            return _range(program, site, entry)
        case SkipConcat():
            return _skip(program, site, entry)
        case SkipArm():
            return arm_claims(program, site, entry)
        case Shift():
            return shift_claims(program, site, entry)
        case LayerPair():
            return _pair(program, site, entry)
        case ChannelScale():
            return _scale(program, site, entry)
        case Codes():
            return _codes(program, site, entry)
        case QParams():
            return _qparams(program, site, entry)
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


def _skip(program: Program, site: Site, entry: SkipConcat) -> Iterator[str]:
    node = program.node(site.at)
    arms = ops.args(node).get("tensors") if ops.is_call(node, "cat") else None
    if not isinstance(arms, (list, tuple)):
        yield "the operation does not concatenate"
        return
    nodes = [arm for arm in arms if isinstance(arm, fx.Node)]
    counts = [arm.meta["val"].shape[1] for arm in nodes]
    claimed = [entry.deep, entry.skip] if entry.skip_last else [entry.skip, entry.deep]
    if counts != claimed:
        yield f"the arms have {counts} channels, not {claimed}"
        return
    deep, skip = nodes if entry.skip_last else nodes[::-1]
    if depth(deep) <= depth(skip):
        yield f"{label(deep)} is called deep, but {label(skip)} has as many convolutions behind it"


def _pair(program: Program, site: Site, entry: LayerPair) -> Iterator[str]:
    if {QDQ, INTEGER} & program.facts:  # then every reader has a dequantize of its own
        return
    if entry.readers[:1] != (site,):
        yield "the entry does not stand at its first reader"
    sources = {program.source(reader) for reader in entry.readers}
    if len(sources) != 1:
        yield f"its readers read {len(sources)} tensors: {', '.join(sorted(map(label, sources)))}"
        return
    source = sources.pop()
    reading = {Site(user.meta["address"], arg) for user, arg in readers(source)}
    left_out = sorted(s for s in reading - set(entry.readers) if _quantized_layer(program, s))
    if left_out:
        yield f"{left_out[0]} reads {label(source)} too and is left out"
    if entry.producer is None and not entry.reason:
        yield "there is no producer and no reason why not"
    if entry.producer is not None and reading != set(entry.readers):
        unscaled = min(reading - set(entry.readers))
        yield f"{entry.producer} is said to absorb the scale, but {unscaled} reads it unscaled"


def _scale(program: Program, site: Site, entry: ChannelScale) -> Iterator[str]:
    gamma = entry.gamma
    if not bool((torch.isfinite(gamma) & (gamma > 0)).all()):
        yield "gamma is not finite and positive everywhere"
    channels = _channels(program, site)
    if channels is not None and tuple(gamma.shape) != (channels[1],):
        yield f"gamma is {list(gamma.shape)}, but the tensor has {channels[1]} channels"
    if program.table.get(site, LayerPair) is None:
        yield "no pair of layers stands behind the scale"


def _codes(program: Program, site: Site, entry: Codes) -> Iterator[str]:
    params, planned = entry.qparams, program.table.get(site, Planned)
    if planned is None or planned.spec is None:
        yield "the weight is not planned to be quantized"
        return
    rows = entry.shape[0]
    yield from _grid(params, planned.spec, 1, rows if planned.spec.per == "channel" else 1)
    count = torch.Size(entry.shape).numel()
    size = -(-count // 2) if planned.spec.bits <= 4 else count
    if entry.packed.dtype != torch.uint8 or entry.packed.numel() != size:
        wanted = f"{list(entry.shape)} codes of {planned.spec.bits} bits take {size} bytes"
        yield f"{wanted}, not {entry.packed.numel()} of {entry.packed.dtype}"
        return
    codes = unpacked(entry, planned.spec.bits)
    if not params.qmin <= int(codes.min()) <= int(codes.max()) <= params.qmax:
        yield f"codes from {int(codes.min())} to {int(codes.max())} are not in {params.qmin} to {params.qmax}"
    if ROUNDED in program.facts and not {QDQ, INTEGER} & program.facts:
        yield from _rounding(program.constant_at(site), codes, params, planned.spec)


def _rounding(weight: Tensor, codes: Tensor, params: QParams, spec: QuantSpec) -> Iterator[str]:
    """Whether each code is the nearest one to the weight as it stands in the graph now."""
    if weight.shape != codes.shape:
        yield f"codes are {list(codes.shape)}, the weight is {list(weight.shape)}"
        return
    exact = steps(weight, QParams(params.scale, params.zero_point, params.qmin, params.qmax, 0), None)
    inside = exact.clamp(params.qmin, params.qmax)
    clipped = (exact - inside).abs().flatten(1).amax(1)
    off = (codes - inside).abs().flatten(1).amax(1)
    if float(off.max()) > _HALF_STEP:
        row = int(off.argmax())
        yield f"output channel {row} is rounded by {float(off[row]):.3g} steps, not to the nearest code"
    if spec.range == "minmax" and float(clipped.max()) > _HALF_STEP:
        row = int(clipped.argmax())
        yield f"output channel {row} is clipped by {float(clipped[row]):.3g} steps; minmax clips nothing"


def _qparams(program: Program, site: Site, entry: QParams) -> Iterator[str]:
    planned, seen = program.table.get(site, Planned), program.table.get(site, Range)
    if planned is None or planned.spec is None:
        yield "the site is not planned to be quantized"
        return
    channels = entry.scale.shape[-1] if planned.spec.per == "channel" else 1
    reasons = list(_grid(entry, planned.spec, len(planned.spec.boundaries) + 1, channels))
    yield from reasons
    if seen is None or reasons or not {FITTED, QDQ, INTEGER} & program.facts:
        return
    low, high = seen.low.double().clamp(max=0), seen.high.double().clamp(min=0)
    if (gamma := pending_scale(program, program.table, site)) is not None:
        low, high = low / gamma.double(), high / gamma.double()
    if planned.spec.per == "tensor":
        low, high = low.amin(1, keepdim=True), high.amax(1, keepdim=True)
    elif entry.scale.shape != low.shape:
        yield f"{list(entry.scale.shape)} scales for a range of {list(low.shape)}"
        return
    scale, zero_point = entry.scale.double(), entry.zero_point.double()
    ends = (entry.qmin - zero_point) * scale, (entry.qmax - zero_point) * scale
    short = torch.maximum(ends[0] - low, high - ends[1]) / scale
    if planned.spec.range == "minmax" and float(short.max()) > _HALF_STEP:
        yield f"the grid ends {float(short.max()):.3g} steps short of the range that was seen"
    symmetric = entry.qmin < 0
    wide = torch.maximum(high / entry.qmax, low / entry.qmin) if symmetric else (high - low) / entry.qmax
    if bool(((scale > 1.01 * wide) & (wide > 0)).any()):
        yield f"steps are {float((scale / wide)[wide > 0].max()):.3g} times as wide as the range needs"


def _grid(params: QParams, spec: QuantSpec, groups: int, channels: int) -> Iterator[str]:
    """Whether the parameters are legal and are those of the spec."""
    affine = spec.grid == "affine"
    ends = (0, 2**spec.bits - 1) if affine else (-(2 ** (spec.bits - 1)), 2 ** (spec.bits - 1) - 1)
    if (params.qmin, params.qmax) != ends:
        yield f"codes {params.qmin} to {params.qmax} are not those of {spec} ({ends[0]} to {ends[1]})"
    if params.boundaries != spec.boundaries:
        yield f"boundaries {params.boundaries} are not the plan's {spec.boundaries}"
    for name in ("scale", "zero_point"):
        if tuple(getattr(params, name).shape) != (groups, channels):
            yield f"{name} is {list(getattr(params, name).shape)}, not [{groups}, {channels}] for {spec}"
    if not bool((torch.isfinite(params.scale) & (params.scale > 0)).all()):
        yield "a scale is not finite and positive"
    zero_point = params.zero_point.double()
    if bool((zero_point != zero_point.round().clamp(params.qmin, params.qmax)).any()):
        yield f"a zero point is not a code in {params.qmin} to {params.qmax}"
    if not affine and bool((zero_point != 0).any()):
        yield "the grid is symmetric, but a zero point is not 0"


def _channels(program: Program, site: Site) -> tuple[int, int] | None:
    """(axis, number) of the channels that arrive at a site, or None where the graph no longer has it."""
    node = program.node(site.at)
    source, axis = ops.args(node).get(site.arg), CHANNEL_AXIS.get(ops.name(node))
    if axis is None or not isinstance(source, fx.Node):
        return None
    return axis, source.meta["val"].shape[axis]


def _quantized_layer(program: Program, site: Site) -> bool:
    """Whether a site is the input of a layer whose input and weight are both planned to be quantized."""
    plans = [program.table.get(s, Planned) for s in (site, Site(site.at, "weight"))]
    return site.arg == "input" and all(plan is not None and plan.spec is not None for plan in plans)
