"""A turn of the sweep: one tensor, and the planned layers that read it."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, fx

from dmqfx.errors import CalibrationError
from dmqfx.graph import ops
from dmqfx.graph.address import Site
from dmqfx.graph.program import Program
from dmqfx.graph.sites import channel_axis
from dmqfx.graph.table import Planned, Range, Sensitivity, Shift, Table
from dmqfx.numbers.fitting import MOMENTUM, RowExtremes
from dmqfx.numbers.observers import Observer
from dmqfx.numbers.parts import WIDEST, part_sizes
from dmqfx.numbers.quant import QParams, QuantSpec
from dmqfx.numbers.scaling import column_factor
from dmqfx.runtime.operators import timestep_group
from dmqfx.sweep.deploy import deployed_input, pending_scales
from dmqfx.sweep.rows import Batch, Batches, Geometry, Rows, sampled

__all__ = ["Batch", "Reader", "Turn", "turns"]

_log = logging.getLogger(__name__)
_PORTION = 512  # rows that are scaled and rounded together


@dataclass(frozen=True)
class Reader:
    """A planned operation that reads the tensor: its input site and spec, its weight's, and its window.

    Shapes: shape is the weight's, [O, C / groups, ...]; () without one.
    """

    site: Site
    spec: QuantSpec | None
    weight: Site | None = None
    weight_spec: QuantSpec | None = None
    geometry: Geometry = field(default_factory=Geometry)
    groups: int = 1
    shape: tuple[int, ...] = ()

    @property
    def columns(self) -> int:
        """Inputs of one output position, those of all groups together."""
        return math.prod(self.shape[1:]) * self.groups if self.shape else 0


@dataclass(eq=False)
class Turn:
    """What a pass sees when a tensor's turn comes: the float and the quantized-so-far value on every row.

    `table` is what is known by now, entries that passes of this sweep wrote in this turn included. A pass
    may set `loss`, the error that it left of the layers' output relative to its size: progress bars show it.
    """

    program: Program
    table: Table
    source: fx.Node
    axis: int
    readers: tuple[Reader, ...]
    batches: Batches
    seed: int = 0
    loss: float | None = None
    _reserved: int = field(default=0, init=False, repr=False)
    _ranges: dict[tuple[float, ...], Range] = field(default_factory=dict, init=False, repr=False)
    _rows: dict[tuple[Geometry, int], Rows] = field(default_factory=dict, init=False, repr=False)

    @property
    def site(self) -> Site:
        """The first reader's input site, by which the turn is known."""
        return self.readers[0].site

    def generator(self) -> torch.Generator:
        """A generator of this turn's own: what it draws does not depend on the turns before."""
        return torch.Generator().manual_seed(self._seed)

    def weight(self, reader: Reader) -> Tensor:
        """The float weight of a reader, as it stands in the graph.

        Shapes: [O, C / groups, ...].
        """
        assert reader.weight is not None  # who asks looked
        return self.program.constant_at(reader.weight).detach()

    def scaled_weight(self, reader: Reader) -> Tensor:
        """The weight as it will be rounded: times the equivalent scale that is learned and not yet in the graph."""
        weight, gamma = self.weight(reader), self.gamma(reader)
        return weight if gamma is None else weight * column_factor(weight.shape, gamma.to(weight))

    def deployed(self, reader: Reader, rows: Rows) -> Tensor:
        """The rows' quantized-so-far values as the layer will see them: scaled, rounded to the planned grid.

        Shapes: [N, C * taps].
        """
        params, shift = self.table.get(reader.site, QParams), self.table.get(reader.site, Shift)
        gamma, found = self.gamma(reader), torch.empty_like(rows.quantized)
        portions = (torch.split(each, _PORTION) for each in (found, rows.quantized, rows.timestep))
        for out, x, timestep in zip(*portions, strict=True):
            channels = x.view(len(x), -1, rows.taps)
            out.copy_(deployed_input(channels, params, gamma, shift, timestep, 1).flatten(1))
        return found

    def wanted(self, reader: Reader, rows: Rows) -> Tensor:
        """What the float layer makes of the rows, without bias.

        Shapes: float64 [N, O].
        """
        weight = self.weight(reader).flatten(1)
        if len(part_sizes(weight.shape[1], rows.taps)) == 1:
            return rows.real.double() @ weight.double().T
        found = weight.new_zeros(len(rows.real), len(weight), dtype=torch.float64)
        for x, w in zip(*(torch.split(each, WIDEST, 1) for each in (rows.real, weight)), strict=True):
            found.addmm_(x.double(), w.double().T)
        return found

    def reserve(self, nbytes: int, reader: Reader) -> None:
        """Room in memory for what a reader's local problem computes with, until the turn ends.

        It may be that of computing a chunk, which nobody does in a turn. Where there is none, a warning says so.
        """
        beside = nbytes - self.batches.working - self._reserved
        if beside <= 0:
            return
        try:
            self.batches.reserve(beside, f"the operands of the local problem of {reader.site}")
        except CalibrationError as error:
            _log.warning("%s\n  they are taken beside it", error)
        else:
            self._reserved += beside

    def bias(self, reader: Reader) -> Tensor | None:
        """The float bias of a reader, or None."""
        named = ops.args(self.program.node(reader.site.at))
        return None if named.get("bias") is None else self.program.constant_at(Site(reader.site.at, "bias"))

    def felt(self, reader: Reader) -> Tensor | None:
        """How much the square of an error in each column of a reader's input weighs; None if it has no weight.

        It is what the weight, times gamma, makes of the column: in the metric of the layer's output, if one is
        known, else over all output channels alike.

        Shapes: float64 [C * taps].
        """
        if reader.weight is None:
            return None
        weight = self.scaled_weight(reader).flatten(1).double()
        felt = self.table.get(Site(reader.site.at, "out"), Sensitivity)
        if felt is None or felt.metric is None or reader.groups > 1:
            return weight.square().view(reader.groups, -1, weight.shape[1]).sum(1).flatten()
        return ((felt.metric.to(weight) @ weight) * weight).sum(0).clamp(min=0)

    def gamma(self, reader: Reader) -> Tensor | None:
        """The equivalent scale of a reader's input that is learned and not yet in the graph, or None.

        Shapes: [C].
        """
        return pending_scales(self.program, self.table).get(reader.site)

    @cached_property
    def channels(self) -> int:
        """Channels of the tensor."""
        return int(self.source.meta["val"].shape[self.axis])

    def range(self, boundaries: tuple[float, ...] = ()) -> Range:
        """Extremes and moments of the quantized-so-far tensor, per timestep group and channel."""
        if boundaries not in self._ranges:
            observer = Observer(str(self.site), self.axis, boundaries)
            for batch in self.batches:
                edges = torch.tensor(boundaries, device=batch.timestep.device)
                group = timestep_group(batch.timestep, edges) if boundaries else None
                observer(batch.quantized, group)
            observer.join(self.batches.gather)
            self._ranges[boundaries] = observer.result()
        return self._ranges[boundaries]

    def row_extremes(self, boundaries: tuple[float, ...], momentum: float = MOMENTUM) -> RowExtremes:
        """Extremes of the quantized-so-far tensor in every calibration row, per channel.

        Shapes, units: those of RowExtremes; timestep groups are cut at `boundaries`.
        """
        low, high, timestep = self._extremes
        return RowExtremes(
            low, high, timestep_group(timestep, torch.tensor(boundaries).to(timestep)), momentum
        )

    @cached_property
    def _extremes(self) -> tuple[Tensor, Tensor, Tensor]:
        found = list[tuple[Tensor, Tensor, Tensor]]()
        for batch in self.batches:
            x = batch.quantized.movedim(self.axis, 1)
            x = x.reshape(*x.shape[:2], -1)
            found.append((x.amin(2), x.amax(2), batch.timestep))
        low, high, timestep = (self.batches.gather(torch.cat(each)) for each in zip(*found, strict=True))
        return low, high, timestep

    def rows(self, reader: Reader, count: int) -> Rows:
        """About `count` output positions, drawn so that every calibration row has its share.

        Raises: CalibrationError if the memory budget has no room for them.
        """
        key = (reader.geometry, count)
        if key not in self._rows:
            what = f"{count} rows of {reader.site}"
            self._rows[key] = sampled(self.batches, reader.geometry, count, self._seed, what)
        return self._rows[key]

    @property
    def _seed(self) -> int:
        """Of this turn alone: what it draws does not depend on the turns before."""
        digest = hashlib.blake2b(f"{self.seed} {self.site}".encode(), digest_size=7).digest()
        return int.from_bytes(digest, "big")


def turns(program: Program) -> dict[fx.Node, list[tuple[int, tuple[Reader, ...]]]]:
    """The planned readers of every tensor that has some, by channel axis, in execution order."""
    found: dict[fx.Node, dict[int, list[Reader]]] = {}
    for node in program.calls():
        for site, source in _read_sites(program, node):
            axis = channel_axis(program, site)
            found.setdefault(source, {}).setdefault(axis, []).append(_reader(program, site))
    return {
        source: [(axis, tuple(readers)) for axis, readers in by_axis.items()]
        for source, by_axis in found.items()
    }


def _read_sites(program: Program, node: fx.Node) -> Iterator[tuple[Site, fx.Node]]:
    """Activation sites of an operation where it, or the weight beside it, is to be quantized."""
    at = node.meta["address"]
    weight = program.table.get(Site(at, "weight"), Planned)
    for arg, value in ops.args(node).items():
        planned = program.table.get(Site(at, arg), Planned) if arg != "weight" else None
        if planned is None or not isinstance(value, fx.Node):
            continue
        if planned.spec is not None or (weight is not None and weight.spec is not None):
            yield Site(at, arg), value


def _reader(program: Program, site: Site) -> Reader:
    node, planned = program.node(site.at), program.table.get(site, Planned)
    spec = planned.spec if planned is not None else None
    weight = Site(site.at, "weight")
    asked = program.table.get(weight, Planned) if site.arg == "input" else None
    if asked is None:
        return Reader(site, spec)
    named, shape = ops.args(node), tuple(ops.tensor(node, "weight").meta["val"].shape)
    geometry, groups = Geometry(), 1
    if ops.is_call(node, "conv2d"):
        stride, dilation = _two(named["stride"]), _two(named["dilation"])
        padding = _sides(named["padding"], shape[2:], dilation)
        geometry = Geometry((shape[2], shape[3]), stride, padding, dilation)
        groups = int(str(named["groups"]))
    return Reader(site, spec, weight, asked.spec, geometry, groups, shape)


def _sides(padding: object, kernel: Sequence[int], dilation: tuple[int, int]) -> tuple[int, int]:
    """Zeros above and to the left, for a padding by numbers or by a word."""
    if padding == "same":
        return dilation[0] * (kernel[0] - 1) // 2, dilation[1] * (kernel[1] - 1) // 2
    return (0, 0) if padding == "valid" else _two(padding)


def _two(value: object) -> tuple[int, int]:
    assert isinstance(value, (list, tuple))  # canonicalize spells them out
    return int(value[0]), int(value[-1])
