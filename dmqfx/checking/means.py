"""Means of layers' outputs, measured anew by plain arithmetic: what is left of their error once biases are corrected."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from dmqfx.checking.faked import fake, group_of, real, shifted, unpacked
from dmqfx.checking.tablecheck import Broken
from dmqfx.graph import ops
from dmqfx.graph.address import Site
from dmqfx.graph.pipeline import PassContext
from dmqfx.graph.program import Program
from dmqfx.graph.table import Bias, Codes, Planned, Shift, Table
from dmqfx.numbers.quant import QParams
from dmqfx.sweep.chunks import chunked
from dmqfx.sweep.turn import Batch, Reader, Turn
from dmqfx.sweep.walk import Walk

__all__ = ["uncorrected"]

_LEFT = 1e-3  # of a channel's root mean square: single precision, and codes that a tie moves


def uncorrected(program: Program, ctx: PassContext) -> Iterator[Broken]:
    """Layers whose output's mean still lacks something on the calibration rows, or that have no Bias and no refusal."""
    if ctx.calibration is None:
        return
    refused = {refusal.at for refusal in ctx.journal.refused}
    chunks = chunked(ctx.calibration, program, ctx.chunk)
    found: list[Broken] = []

    def visit(turn: Turn) -> Table:
        for reader in turn.readers:
            site = Site(reader.site.at, "bias")
            if site.at not in refused and (reason := _against(turn, reader, site)):
                found.append(Broken(site, "Bias", reason))
        return turn.table

    Walk(program, chunks, memory=ctx.memory, total=len(ctx.calibration)).run(visit)
    yield from found


def _against(turn: Turn, reader: Reader, site: Site) -> str | None:
    """What speaks against a layer's bias."""
    codes, bias = turn.table.get(Site(site.at, "weight"), Codes), turn.table.get(site, Bias)
    if codes is None:
        return None
    if bias is None:
        return "the layer's bias is not corrected, and no refusal says why"
    left, size = _left(turn, reader, codes, bias)
    channel = int((left / size).argmax())
    share = float(left[channel] / size[channel])
    return None if share <= _LEFT else f"the mean of channel {channel} is off by {share:.2g} of its size"


def _left(turn: Turn, reader: Reader, codes: Codes, bias: Bias) -> tuple[Tensor, Tensor]:
    """The error that is left of each channel's mean, timesteps alike, and the channel's root mean square [O]."""
    spec = turn.table.get(Site(reader.site.at, "weight"), Planned)
    assert spec is not None
    assert spec.spec is not None  # there are codes
    weight = real(unpacked(codes, spec.spec.bits), replace(codes.qparams, axis=0), None)
    own = turn.bias(reader)
    means: dict[float, list[Tensor]] = {}
    squares: list[Tensor] = []
    for batch in turn.batches:
        want = _layer(
            turn, reader, batch.real, turn.weight(reader), torch.zeros(len(weight)) if own is None else own
        )
        got = _layer(turn, reader, _arriving(turn, reader, batch), weight, bias.value)
        for row, timestep in enumerate(batch.timestep.tolist()):
            means.setdefault(timestep, []).append((want[row] - got[row]).mean(0))
            squares.append(want[row].square().mean(0))
    left = torch.stack([torch.stack(rows).mean(0) for rows in means.values()]).mean(0)
    return left.abs(), torch.stack(squares).mean(0).sqrt().clamp(min=torch.finfo(torch.float32).tiny)


def _arriving(turn: Turn, reader: Reader, batch: Batch) -> Tensor:
    """What the quantized layer reads, channels where they were."""
    x, gamma = batch.quantized.double(), turn.gamma(reader)
    if gamma is not None:
        x = (x.movedim(turn.axis, -1) / gamma.double()).movedim(-1, turn.axis)
    params, shift = turn.table.get(reader.site, QParams), turn.table.get(reader.site, Shift)
    if params is None:
        return x
    if shift is not None:
        params = shifted(params, shift, turn.axis)
    group = group_of(batch.timestep, params.boundaries) if params.boundaries else None
    return fake(x, params, group)


def _layer(turn: Turn, reader: Reader, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The layer's output in float64, [B, positions, O]."""
    node: fx.Node = turn.program.node(reader.site.at)
    x, weight, bias = x.double(), weight.double().view(reader.shape), bias.double()
    if ops.is_call(node, "linear"):
        return F.linear(x, weight, bias).reshape(len(x), -1, len(weight))
    named = ops.args(node)
    out = F.conv2d(x, weight, bias, *(named[k] for k in ("stride", "padding", "dilation", "groups")))  # type: ignore[arg-type]  # canonical
    return out.flatten(2).movedim(1, 2)
