"""Programs, calibration rows and passes for the tests of the sweep."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import ClassVar

import torch
from handmade import program_of
from models import captured, relative
from torch import Tensor, fx
from torch._ops import OpOverload
from toys import toy

from dmqfx.calibration.calibration import Calibration
from dmqfx.calibration.rows import Column, Rows
from dmqfx.graph import ops
from dmqfx.graph.address import Address, Site
from dmqfx.graph.facts import PLANNED, Fact
from dmqfx.graph.modules import clone
from dmqfx.graph.pipeline import PassContext, Pipeline
from dmqfx.graph.program import Program
from dmqfx.graph.registry import pipeline
from dmqfx.graph.table import Entry, Table
from dmqfx.policy.policy import Policy
from dmqfx.sweep.chunks import chunked
from dmqfx.sweep.sweep import SweepPass
from dmqfx.sweep.turn import Turn
from dmqfx.sweep.values import Pair
from dmqfx.sweep.walk import Walk

aten = torch.ops.aten
POLICY = Policy.load(
    {
        "schema": "dmqfx.policy/1",
        "name": "sweep",
        "default": {
            "weight": {"bits": 4, "grid": "symmetric", "per": "channel", "range": "mse"},
            "input": {"bits": 8, "grid": "affine", "per": "tensor", "groups": 4},
        },
        "rules": [
            {"name": "ends", "at": ["conv_in/*", "conv_out/*"], "keep": "float", "optional": True},
            {"name": "attention", "kind": "attention", "input": {"bits": 8}, "optional": True},
            {"name": "values", "at": "**to_v/*", "input": {"groups": 1, "bits": 6}, "optional": True},
        ],
        "pipeline": ["canonicalize", "flag-skips", "plan-sites"],
    }
)
SWEEP = (("fit-ranges", {}), ("round-weights", {"method": "gptq", "rows": 64}))
VOTED = (SWEEP[0], ("vote-shifts", {"where": "all", "agree": 0.3}), SWEEP[1])


@cache
def planned(name: str = "toy") -> Program:
    """The toy, or a model of diffusers, with a plan."""
    program = toy() if name == "toy" else captured(name)[1]
    steps = pipeline([("canonicalize", {}), ("flag-skips", {}), ("plan-sites", {})])
    return steps.run(program, PassContext(POLICY))


@cache
def chain(layers: int = 8, width: int = 8, *, residual: bool = False, peeked: bool = False) -> Program:
    """Convolutions with a linear layer for the timestep in the middle, made in milliseconds and planned.

    If they are residual, each but the first is a block: what it makes is added to what it reads. With `peeked`, what the
    convolution of the first block puts out is read outside, too, before the addition.
    """
    generator = torch.Generator().manual_seed(0)
    graph, constants = fx.Graph(), dict[str, Tensor]()

    def layer(name: str, target: OpOverload, shape: tuple[int, ...], x: fx.Node, *more: object) -> fx.Node:
        constants[name] = torch.randn(shape, generator=generator) / math.prod(shape[1:]) ** 0.5
        constants[f"{name}_bias"] = torch.randn(shape[0], generator=generator)
        read = [graph.get_attr(each) for each in (name, f"{name}_bias")]
        node = graph.call_function(target, (x, *read, *more))
        node.meta["address"] = Address(name, ops.name(node))
        return node

    x, timestep = graph.placeholder("sample"), graph.placeholder("timestep")
    for k in range(layers):
        first, trunk = (4 if k == 0 else width), x
        x = layer(f"conv{k}", aten.conv2d.default, (width, first, 3, 3), x, [1, 1], [1, 1])
        if k == layers // 2:
            time = graph.call_function(
                aten.mul.Tensor, (graph.call_function(aten.unsqueeze.default, (timestep, 1)), 1e-3)
            )
            time = layer("time", aten.linear.default, (width, 1), time)
            x = graph.call_function(
                aten.add.Tensor, (x, graph.call_function(aten.view.default, (time, [-1, width, 1, 1])))
            )
        side = graph.call_function(aten.mul.Tensor, (x, 0.5)) if peeked and k == 1 else None
        x = graph.call_function(aten.silu.default, (x,))
        if residual and k > 0:
            x = graph.call_function(aten.add.Tensor, (trunk, x))
            x.meta["address"] = Address(f"block{k}", "add")
        if side is not None:
            x = graph.call_function(aten.mul.Tensor, (x, side))
    graph.output((x,))
    return pipeline([("canonicalize", {}), ("plan-sites", {})]).run(
        program_of(graph, constants), PassContext(POLICY)
    )


def recorded(
    program: Program, *counts: int, seed: int = 0, sizes: Mapping[str, int] | None = None
) -> Calibration:
    """Noise rows at even timesteps; a second group of rows is larger, a third larger still."""
    generator = torch.Generator().manual_seed(seed)
    groups, step = [], program.inputs.multiple_of
    for k, count in enumerate(counts):
        grown = {side: program.inputs.sizes[side] + 2 * k * step for side in "HW"} | dict(sizes or {})
        inputs = program.inputs.draw(generator, B=count, **grown)
        inputs["timestep"] = torch.linspace(999, 0, count)
        each = torch.arange(count)
        columns = {name: Column(value, each) for name, value in inputs.items()}
        groups.append(Rows(columns, torch.zeros_like(each), each))
    return Calibration(tuple(groups))


def context(calibration: Calibration, **changes: object) -> PassContext:
    """A context of four rows at a time."""
    return replace(PassContext(POLICY, calibration, chunk=4), **changes)


def swept(
    program: Program,
    ctx: PassContext,
    steps: Sequence[tuple[str, Mapping[str, object]]] = SWEEP,
    *more: SweepPass,
) -> Program:
    """The program behind a sweep."""
    return Pipeline((*pipeline(steps).steps, *more)).run(program, ctx)


def output(value: object) -> Tensor:
    """The one tensor of an output."""
    first = value[0] if isinstance(value, (tuple, list)) else value
    assert isinstance(first, Tensor)
    return first


def output_noise(program: Program, data: Calibration) -> float:
    """The relative error of a program whose table is complete."""
    outputs: list[Pair] = []
    Walk(program, chunked(data, program, 4), memory=2**30, total=len(data)).run(
        lambda turn: turn.table, outputs
    )
    pairs = [(output(pair.quantized), output(pair.real)) for pair in outputs]
    quantized, real = (torch.cat([each[k].flatten() for each in pairs]) for k in (0, 1))
    return relative(quantized, real)


def changed(program: Program, **weights: Callable[[Tensor], Tensor]) -> Program:
    """The program with some weights changed; `__` stands for a dot in a name."""
    constants = {name: value.clone() for name, value in program.weights().items()}
    for name, change in weights.items():
        constants[name.replace("__", ".")] = change(constants[name.replace("__", ".")])
    return replace(program, gm=clone(program.gm, constants))


def bits(table: Table) -> dict[str, bytes]:
    """Every tensor of a table, bit for bit."""
    return {
        f"{type(entry).__name__} {site} {name} {list(value.shape)}": value.contiguous().numpy().tobytes()
        for site, entry in table
        for name, value in tensors(entry)
    }


def tensors(entry: object) -> Iterable[tuple[str, Tensor]]:
    """The tensors of an entry, by name."""
    for name, value in vars(entry).items():
        if isinstance(value, Tensor):
            yield name, value
        elif hasattr(value, "__dict__"):
            yield from tensors(value)


@dataclass(frozen=True)
class Tell(SweepPass):
    """Writes nothing in the table, and a line for each visit in a file.

    Units: pause in seconds.
    """

    requires: ClassVar[frozenset[Fact]] = frozenset({PLANNED})
    file: str = ""
    pause: float = 0.0

    def visit(self, turn: Turn, ctx: PassContext) -> Iterable[tuple[Site, Entry]]:
        with Path(self.file).open("a") as file:
            file.write(f"{turn.site}\n")
        time.sleep(self.pause)
        return ()


@dataclass(frozen=True)
class Stop(SweepPass):
    """Interrupts the turn of a site, as a user would."""

    requires: ClassVar[frozenset[Fact]] = frozenset({PLANNED})
    at: ClassVar[str] = ""

    def visit(self, turn: Turn, ctx: PassContext) -> Iterable[tuple[Site, Entry]]:
        if str(turn.site) == self.at:
            raise KeyboardInterrupt
        return ()
