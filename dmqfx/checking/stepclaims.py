"""Claims about arms of skips and about shifts, held against the graph."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, fx

from dmqfx.checking.structure import depth
from dmqfx.graph import ops
from dmqfx.graph.address import Site
from dmqfx.graph.modules import constant, label
from dmqfx.graph.program import Program
from dmqfx.graph.table import Shift, SkipArm
from dmqfx.numbers.quant import QParams

__all__ = ["arm_claims", "shift_claims"]


def arm_claims(program: Program, site: Site, entry: SkipArm) -> Iterator[str]:
    """Whether the other arm stands beside it, and the deep one has more convolutions behind it than the skip."""
    if not ops.is_call(program.node(site.at), "conv2d", "qconv2d", "kernel_conv2d"):
        yield "the operation is no convolution"
        return
    arms = {
        arm.arm: _source(program, at)
        for at, arm in program.table.of(SkipArm).items()
        if arm.concat == entry.concat and at.at.path == site.at.path
    }
    if set(arms) != {"deep", "skip"}:
        yield f"the arms of {entry.concat} at {site.at.path} are {sorted(arms)}, not a deep one and a skip"
    elif depth(arms["deep"]) <= depth(arms["skip"]):
        names = label(arms["deep"]), label(arms["skip"])
        yield f"{names[0]} is called deep, but {names[1]} has as many convolutions behind it"


def shift_claims(program: Program, site: Site, entry: Shift) -> Iterator[str]:
    """Whether the exponents are those of the site's channels and groups, shift something, and are in the graph."""
    exponent, params = entry.exponent, program.table.get(site, QParams)
    if exponent.dtype != torch.uint8:
        yield f"exponents are {exponent.dtype}, not uint8"
    if int(exponent.max()) > entry.largest:
        yield f"an exponent is {int(exponent.max())}, the largest should be {entry.largest}"
    if bool((exponent == entry.largest).all()):
        yield "it shifts no channel"
    if params is None or params.scale.shape[1] != 1:
        yield "the site has no scale of the whole tensor, which a shift could divide"
        return
    source, axis = _source(program, site), 1 if site.at.op == "conv2d" else -1
    wanted = [len(params.scale), source.meta["val"].shape[axis]]
    if list(exponent.shape) != wanted:
        yield f"exponents are {list(exponent.shape)}, not {wanted}"
        return
    yield from _in_graph(program, site, entry, params, axis)


def _in_graph(program: Program, site: Site, entry: Shift, params: QParams, axis: int) -> Iterator[str]:
    """Whether a dequantize, or the integer layer, has these exponents and the step that they start from."""
    reader, source = program.node(site.at), ops.args(program.node(site.at)).get(site.arg)
    if "x_codes" in ops.args(reader):
        holder, scale = reader, "x_scale"
    elif ops.is_call(source, "dequantize") and isinstance(source, fx.Node):
        holder, scale = source, "scale"
        if ops.args(holder)["axis"] != axis:
            yield f"{label(holder)} shifts along axis {ops.args(holder)['axis']}, channels lie on {axis}"
    else:
        return
    there = _constant(program, holder, "shift")
    if there is None or not torch.equal(there.cpu(), entry.exponent.cpu()):
        yield f"{label(holder)} has {'no' if there is None else 'another'} shift"
    step = _constant(program, holder, scale)
    if step is None or not torch.equal(step.cpu() * 2**entry.largest, params.scale.cpu()):
        yield f"the scale of {label(holder)} is not 1/{2**entry.largest} of the site's step"


def _source(program: Program, site: Site) -> fx.Node:
    named = ops.args(program.node(site.at))
    return ops.tensor(program.node(site.at), "x_codes" if "x_codes" in named else site.arg)


def _constant(program: Program, node: fx.Node, arg: str) -> Tensor | None:
    read = ops.args(node)[arg]
    fixed = isinstance(read, fx.Node) and read.op == "get_attr"
    return constant(program.gm, str(read.target)) if fixed and isinstance(read, fx.Node) else None
