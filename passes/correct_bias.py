"""correct-bias: biases that make up for what quantization takes from the mean of each output channel."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from dmqfx.graph.address import Site
from dmqfx.graph.facts import CORRECTED, ROUNDED, Fact
from dmqfx.graph.modules import call_with, constant, constant_of
from dmqfx.graph.pipeline import PassContext
from dmqfx.graph.program import Program
from dmqfx.graph.sites import CHANNEL_AXIS
from dmqfx.graph.table import Bias, Entry
from dmqfx.numbers import effort
from dmqfx.numbers.speeds import Speeds
from dmqfx.sweep.deploy import Deployed, pending_scales
from dmqfx.sweep.sweep import SweepPass
from dmqfx.sweep.turn import Reader, Turn


@dataclass(frozen=True)
class CorrectBias(SweepPass):
    """bias  ->  bias + mean(float output - quantized output), per channel of every layer with Codes.

    The float layer sees the float network's tensor, the quantized one what the network as quantized so far
    gives it, so the correction makes up for upstream layers too. All positions of all calibration rows count,
    those of every timestep together as much as those of any other. A layer without a bias gets one.

    Source: bias correction of data-free quantization (arXiv 1906.04721), with measured means.
    """

    requires: ClassVar[frozenset[Fact]] = frozenset({ROUNDED})
    provides: ClassVar[frozenset[Fact]] = frozenset({CORRECTED})

    def cost(self, program: Program, reader: Reader, values: float, speeds: Speeds) -> float:
        """Seconds of rounding the tensor once more, and of the means of both outputs."""
        if reader.weight_spec is None:
            return 0.0
        positions = values / (reader.shape[1] * reader.groups * math.prod(reader.geometry.stride))
        rounded = effort.rounding(speeds, values) if reader.spec is not None else 0.0
        return rounded + 2 * effort.means(speeds, positions * reader.shape[0])

    def calls(self, reader: Reader) -> int:
        """Of the float layer and of the quantized one."""
        return 2 if reader.weight_spec is not None else 0

    def visit(self, turn: Turn, ctx: PassContext) -> Iterator[tuple[Site, Entry]]:
        """One call of each reader's float layer and one of its quantized layer for every chunk."""
        for reader in turn.readers:
            if reader.weight is None:
                continue
            site = Site(reader.site.at, "bias")
            if reader.weight_spec is None:
                ctx.journal.refuse(site, "mean", "the weight stays float, and so does the layer's bias")
            elif not ctx.journal.exhausted:
                offset = lacking(turn, reader)
                ctx.journal.apply(site, "mean", f"by up to {float(offset.abs().max()):.2g}")
                yield site, Bias(_current(turn, reader, site, offset) + offset)


def lacking(turn: Turn, reader: Reader) -> Tensor:
    """What the mean of a layer's quantized output lacks.

    Shapes: [O], in the program's dtype.
    """
    program, node = turn.program, turn.program.node(reader.site.at)
    quantized = Deployed(program, turn.table, node, pending_scales(program, turn.table))
    axis, differences, timesteps = CHANNEL_AXIS[reader.site.at.op], list[Tensor](), list[Tensor]()

    def given(x: Tensor) -> Callable[[fx.Node], object]:
        return lambda read: (
            x if read is turn.source else constant_of(read, lambda name: constant(program.gm, name))
        )

    for batch in turn.batches:
        assert callable(node.target)  # sites are arguments of operators
        want = call_with(node.target, node.args, node.kwargs, given(batch.real))
        got = quantized(batch.timestep, given(batch.quantized))
        assert isinstance(want, Tensor)
        assert isinstance(got, Tensor)
        differences.append(_row_means(want, axis) - _row_means(got, axis))
        timesteps.append(batch.timestep)
    rows, timestep = (turn.batches.gather(torch.cat(each)) for each in (differences, timesteps))
    return _uniform(rows, timestep).to(program.dtype)


def _row_means(out: Tensor, axis: int) -> Tensor:
    """float64 [B, O]."""
    rows = out.movedim(axis, -1)
    return rows.reshape(len(rows), -1, rows.shape[-1]).double().mean(1)


def _uniform(rows: Tensor, timestep: Tensor) -> Tensor:
    """The mean over timesteps of the mean over each one's rows.

    Shapes: rows [N, O]; timestep [N]; returns [O].
    """
    _, index, count = torch.unique(timestep, return_inverse=True, return_counts=True)
    mean: Tensor = (rows / count[index, None]).sum(0) / len(count)
    return mean


def _current(turn: Turn, reader: Reader, site: Site, like: Tensor) -> Tensor:
    """The bias as it is by now: one that came with the rounding, the layer's own, or zeros."""
    if (found := turn.table.get(site, Bias)) is not None:
        return found.value
    bias = turn.bias(reader)
    return torch.zeros_like(like) if bias is None else bias
