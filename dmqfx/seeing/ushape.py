"""The U of a UNet as places on a plane: x is execution order, y is resolution."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from torch import Tensor, fx

from dmqfx.graph import ops
from dmqfx.graph.address import Address
from dmqfx.graph.program import Program
from dmqfx.graph.table import SkipArm, SkipConcat
from dmqfx.seeing.bits import layers

__all__ = ["CELL", "Arc", "Lane", "UShape", "Unit", "u_shape"]

CELL = 14.0
"""Width and height of a layer's cell; all places are in this unit of length, pixels."""
_GAP, _BLOCK_GAP, _PAD = 9.0, 32.0, 4.0
_LEFT, _TOP = 74.0, 74.0
_ARC_STEP, _ARC_ROOM, _LABEL_ROOM = 7.0, 14.0, 26.0
_MOST_ROWS = 12
# Operators whose four-dimensional results are feature maps, not attention heads.
_MAPS = ("conv2d", "group_norm", "add", "cat", "upsample_nearest2d", "avg_pool2d", "conv_transpose2d")

Size = tuple[int, int]


@dataclass(frozen=True)
class Unit:
    """Layers of one module (a resnet, a transformer, a sampler) that run one after another, in a small grid.

    Shapes: x, y is the upper left corner; columns are filled from top to bottom.
    """

    name: str
    block: str
    layers: tuple[Address, ...]
    size: Size | None
    x: float
    y: float

    @property
    def rows(self) -> int:
        """Cells in a column."""
        return _rows(len(self.layers))

    @property
    def width(self) -> float:
        """From the left to the right edge."""
        return _width(len(self.layers))

    @property
    def height(self) -> float:
        """From the upper to the lower edge."""
        return self.rows * CELL + 2 * _PAD

    @property
    def middle(self) -> tuple[float, float]:
        """The centre."""
        return self.x + self.width / 2, self.y + self.height / 2

    def cells(self) -> Iterator[tuple[Address, float, float]]:
        """Each layer with the centre of its cell."""
        for k, at in enumerate(self.layers):
            column, row = divmod(k, self.rows)
            yield at, self.x + _PAD + (column + 0.5) * CELL, self.y + _PAD + (row + 0.5) * CELL


@dataclass(frozen=True)
class Lane:
    """The horizontal band of one resolution; `size` is None for vectors, such as the time embedding."""

    size: Size | None
    top: float
    middle: float
    bottom: float


@dataclass(frozen=True)
class Arc:
    """A long skip from one unit to another, bridging at height `y`."""

    at: Address
    entry: SkipConcat | SkipArm
    source: Unit
    target: Unit
    y: float


@dataclass(frozen=True)
class UShape:
    """Everything that has a place."""

    units: tuple[Unit, ...]
    lanes: tuple[Lane, ...]
    arcs: tuple[Arc, ...]

    @property
    def width(self) -> float:
        """From 0 to the right edge."""
        return max((unit.x + unit.width for unit in self.units), default=_LEFT) + _BLOCK_GAP

    @property
    def bottom(self) -> float:
        """From 0 to the lower edge."""
        return self.lanes[-1].bottom if self.lanes else _TOP


@dataclass(frozen=True)
class _Skip:
    """A long skip: what is known of it, and the numbers of the units that make and that read it."""

    at: Address
    entry: SkipConcat | SkipArm
    source: int
    target: int


@dataclass(frozen=True)
class _Run:
    """Layers of one unit, one after another, at one resolution."""

    name: str
    layers: tuple[Address, ...]
    size: Size | None


def u_shape(program: Program) -> UShape:
    """Places for every layer of a program and every long skip that flag-skips has found."""
    runs = _runs(program)
    skips = list(_skips(program, {at: k for k, run in enumerate(runs) for at in run.layers}))
    lanes: dict[Size | None, Lane] = {}
    top = _TOP
    for size in sorted({run.size for run in runs}, key=lambda size: -math.prod(size or (math.inf,))):
        height = max(_rows(len(run.layers)) for run in runs if run.size == size) * CELL + 2 * _PAD
        arcs = sum(1 for skip in skips if runs[skip.target].size == size)
        room = _ARC_ROOM + _ARC_STEP * arcs if arcs else _GAP
        lanes[size] = Lane(size, top, top + room + height / 2, top + room + height + _LABEL_ROOM)
        top = lanes[size].bottom
    units = _placed(runs, lanes)
    return UShape(units, tuple(lanes.values()), tuple(_bridged(units, skips)))


def _runs(program: Program) -> list[_Run]:
    """Consecutive layers of one unit, at the size of what the last puts out or else of what the unit does."""
    maps: dict[str, Size] = {}
    for node in program.calls():
        size = _size(node)
        if node.meta["address"].op in _MAPS and size is not None:
            maps[_unit(node.meta["address"].path)] = size
    found: list[_Run] = []
    for name, run in groupby(layers(program), key=lambda at: _unit(at.path)):
        members = tuple(run)
        last = members[-1]
        size = _size(program.node(last)) if last.op in _MAPS else None
        found.append(_Run(name, members, size or maps.get(name)))
    return found


def _size(node: fx.Node) -> Size | None:
    value = node.meta["val"]
    if isinstance(value, Tensor) and value.dim() == 4:
        return int(value.shape[2]), int(value.shape[3])
    return None


def _placed(runs: Sequence[_Run], lanes: Mapping[Size | None, Lane]) -> tuple[Unit, ...]:
    units: list[Unit] = []
    x = _LEFT
    for run in runs:
        block = _block(run.name)
        if units and (units[-1].block, units[-1].size) != (block, run.size):
            x += _BLOCK_GAP - _GAP
        y = lanes[run.size].middle - _rows(len(run.layers)) * CELL / 2 - _PAD
        units.append(Unit(run.name, block, run.layers, run.size, x, y))
        x += units[-1].width + _GAP
    return tuple(units)


def _skips(program: Program, unit_of: Mapping[Address, int]) -> Iterator[_Skip]:
    """The long skips that are made and read by layers."""
    place = {node: k for k, node in enumerate(program.graph.nodes)}
    made = [(place[program.node(at)], unit) for at, unit in unit_of.items()]
    for at, entry, arm, reader in _skip_arms(program):
        source = max((unit for k, unit in made if k <= place[arm]), default=None)
        target = min((unit for k, unit in made if k >= place[reader]), default=None)
        if source is not None and target is not None:
            yield _Skip(at, entry, source, target)


def _skip_arms(program: Program) -> Iterator[tuple[Address, SkipConcat | SkipArm, fx.Node, fx.Node]]:
    """(address, entry, skip, reader): of concatenations and, where those are gone, of the layer that reads the skip."""
    for site, concat in program.table.of(SkipConcat).items():
        arms = ops.args(program.node(site.at))["tensors"]
        skip = arms[-1 if concat.skip_last else 0] if isinstance(arms, (list, tuple)) else None
        if isinstance(skip, fx.Node):
            yield site.at, concat, skip, program.node(site.at)
    for site, arm in program.table.of(SkipArm).items():
        if arm.arm == "skip" and arm.concat not in program:
            reader = program.node(site.at)
            yield site.at, arm, _unquantized(reader.all_input_nodes[0]), reader


def _unquantized(node: fx.Node) -> fx.Node:
    """What was quantized, if this is of codes."""
    while ops.is_call(node, "quantize", "dequantize"):
        node = node.all_input_nodes[0]
    return node


def _bridged(units: tuple[Unit, ...], skips: list[_Skip]) -> Iterator[Arc]:
    """Arcs with their heights: in each lane the longest bridges over the others."""
    depth: dict[Size | None, int] = {}
    for skip in sorted(skips, key=lambda skip: skip.target - skip.source):
        source, target = units[skip.source], units[skip.target]
        top = min(unit.y for unit in units if unit.size == target.size)
        height = top - _ARC_ROOM / 2 - _ARC_STEP * depth.get(target.size, 0)
        yield Arc(skip.at, skip.entry, source, target, height)
        depth[target.size] = depth.get(target.size, 0) + 1


def _block(path: str) -> str:
    """`down_blocks.0` of `down_blocks.0.resnets.1.conv1`: the first name, with its number."""
    names = path.split(".")
    return ".".join(names[: 2 if names[1:2] and names[1].isdigit() else 1])


def _unit(path: str) -> str:
    """`down_blocks.0.resnets.1` of `down_blocks.0.resnets.1.conv1`: the block and the numbered name in it."""
    block = _block(path)
    names = path[len(block) + 1 :].split(".")
    return f"{block}.{names[0]}.{names[1]}" if names[1:2] and names[1].isdigit() else block


def _rows(count: int) -> int:
    """A small unit is a square, a large one stands upright, so that the whole does not become too wide."""
    return min(_MOST_ROWS, math.ceil(math.sqrt(count if count <= 6 else 1.7 * count)))


def _width(count: int) -> float:
    return math.ceil(count / _rows(count)) * CELL + 2 * _PAD
