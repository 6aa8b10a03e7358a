"""Claims about grids: whether scales, zero points and codes are those of the plan, the range and the graph."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, fx

from dmqfx.checking.faked import fake
from dmqfx.graph import ops
from dmqfx.graph.address import Site
from dmqfx.graph.facts import QDQ, STEPPED
from dmqfx.graph.modules import label
from dmqfx.graph.program import Program
from dmqfx.graph.table import Planned, Range, Shift
from dmqfx.numbers.quant import QParams, QuantSpec
from dmqfx.sweep.deploy import pending_scales

__all__ = ["HALF_STEP", "activation_claims", "finest", "grid_claims", "scale_claims"]

HALF_STEP = 0.5 + 1e-3
_SAME_STEP = 1e-5  # relative: what single precision leaves of a scale
_WORSE = 1.1  # squared error: a search may weigh great errors more


def grid_claims(params: QParams, spec: QuantSpec, groups: int, channels: int) -> Iterator[str]:
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


def scale_claims(weight: Tensor, params: QParams, spec: QuantSpec) -> Iterator[str]:
    """Whether a weight's scales are those of its whole range, or (mse) of a part that is rounded better."""
    rows = weight.flatten(1) if spec.per == "channel" else weight.reshape(1, -1)
    low, high = rows.amin(1)[None], rows.amax(1)[None]
    if spec.range == "minmax":
        yield from _just(low, high, params)
        return
    step, _ = _needed(low, high, params)
    live = _live(step, params)[0]
    wide = (params.scale.double() > step * (1 + _SAME_STEP))[0]
    whole = replace(finest(low, high, params), axis=0)
    ours, theirs = (
        (fake(rows, grid, None) - rows).double().square().sum(1) for grid in (replace(params, axis=0), whole)
    )
    for wrong, told in (
        (wide, "has wider steps than its whole range needs"),
        (ours > _WORSE * theirs, "is rounded worse than in its whole range"),
    ):
        if bool((wrong & live).any()):
            yield f"output channel {int((wrong & live).nonzero()[0])} {told}"


def activation_claims(program: Program, site: Site, entry: QParams) -> Iterator[str]:
    """What speaks against the parameters of an activation."""
    planned, seen = program.table.get(site, Planned), program.table.get(site, Range)
    if planned is None or planned.spec is None:
        yield "the site is not planned to be quantized"
        return
    channels = entry.scale.shape[-1] if planned.spec.per == "channel" else 1
    reasons = list(grid_claims(entry, planned.spec, len(planned.spec.boundaries) + 1, channels))
    yield from reasons
    if not reasons and QDQ in program.facts:
        yield from _in_graph(program, site, entry)
    if seen is None or reasons or STEPPED in program.facts:  # the ledger bounds steps that were learned
        return
    low, high = seen.low.double(), seen.high.double()
    if (gamma := pending_scales(program, program.table).get(site)) is not None:
        low, high = low / gamma.double(), high / gamma.double()
    if planned.spec.per == "tensor":
        low, high = low.amin(1, keepdim=True), high.amax(1, keepdim=True)
    elif entry.scale.shape != low.shape:
        yield f"{list(entry.scale.shape)} scales for a range of {list(low.shape)}"
        return
    if planned.spec.range == "minmax":
        yield from _just(low, high, entry)
    else:
        yield from _within(low, high, entry)


def _in_graph(program: Program, site: Site, entry: QParams) -> Iterator[str]:
    """Whether a quantize and dequantize in front of a site have the entry's zero points and codes."""
    dequantize = program.source(site)
    codes = ops.args(dequantize)["codes"] if ops.is_call(dequantize, "dequantize") else None
    if not isinstance(codes, fx.Node) or not ops.is_call(codes, "quantize"):
        return
    said = ops.args(codes)
    if (said["qmin"], said["qmax"]) != (entry.qmin, entry.qmax):
        yield f"codes go from {said['qmin']} to {said['qmax']} in the graph, not {entry.qmin} to {entry.qmax}"
    arguments = [(codes, "zero_point"), (dequantize, "zero_point")]
    if program.table.get(site, Shift) is None:  # which has claims of its own about the scale
        arguments.append((dequantize, "scale"))
    for node, arg in arguments:
        there, wanted = program.constant_at(Site(node.meta["address"], arg)), getattr(entry, arg)
        if not torch.equal(there.cpu(), wanted.cpu()):
            yield f"{label(node)} has another {arg} than the table"


def finest(low: Tensor, high: Tensor, params: QParams) -> QParams:
    """The finest grid from low to high with the codes of `params`.

    Shapes: low, high [G, C].
    """
    step, zero_point = _needed(low, high, params)
    return replace(params, scale=step.where(step > 0, 1.0), zero_point=zero_point.round())


def _just(low: Tensor, high: Tensor, params: QParams) -> Iterator[str]:
    """Whether a grid reaches from low to high, has 0 on it, and is no coarser than that takes."""
    step, zero_point = _needed(low, high, params)
    live = _live(step, params)
    off = (params.scale.double() / step)[live]
    if bool(((off - 1).abs() > _SAME_STEP).any()):
        yield f"steps are {float(off[(off - 1).abs().argmax()]):.6g} times as wide as the range needs"
    if bool(((params.zero_point - zero_point).abs()[live] > HALF_STEP).any()):
        yield "a zero point is not where the range has its zero"


def _within(low: Tensor, high: Tensor, params: QParams) -> Iterator[str]:
    """Whether a grid is no coarser than the whole range needs, and (affine) lies in it but for a step."""
    step, _ = _needed(low, high, params)
    live, scale, zero_point = _live(step, params), params.scale.double(), params.zero_point.double()
    wide = (scale > step * (1 + _SAME_STEP)) & live
    if bool(wide.any()):
        yield f"steps of timestep group {int(wide.nonzero()[0, 0])} are wider than the whole range needs"
    if params.qmin < 0:
        return
    below = low.clamp(max=0) - (params.qmin - zero_point) * scale
    above = (params.qmax - zero_point) * scale - high.clamp(min=0)
    beyond = (torch.maximum(below, above) > scale) & live
    if bool(beyond.any()):
        yield f"codes of timestep group {int(beyond.nonzero()[0, 0])} lie beyond the range"


def _needed(low: Tensor, high: Tensor, params: QParams) -> tuple[Tensor, Tensor]:
    """Step and unrounded zero point of the finest grid from low to high with the codes of `params`.

    Shapes: low, high and results [G, C], in float64.
    """
    low, high = low.double().clamp(max=0), high.double().clamp(min=0)
    if params.qmin < 0:
        return torch.maximum(high / params.qmax, low / params.qmin), torch.zeros_like(low)
    step = (high - low) / (params.qmax - params.qmin)
    return step, params.qmin - (low / step).nan_to_num(nan=0.0)


def _live(step: Tensor, params: QParams) -> Tensor:
    """Where a range has a step at all; an all-zero one may have any scale."""
    return step > torch.finfo(params.scale.dtype).tiny
