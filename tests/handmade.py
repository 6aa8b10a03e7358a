"""A program of a dozen operations with a complete table, made in milliseconds."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor, fx

from dmqfx.graph import ops, registry
from dmqfx.graph.address import Address, Site
from dmqfx.graph.facts import CANONICAL, PLANNED, SCALED
from dmqfx.graph.inputs import Input, InputSpec
from dmqfx.graph.modules import build, propagate
from dmqfx.graph.pipeline import PassContext
from dmqfx.graph.program import Program
from dmqfx.graph.table import ChannelScale, LayerPair, Planned, Range, SkipConcat, Table
from dmqfx.numbers.quant import QuantSpec
from dmqfx.policy.policy import Policy
from dmqfx.runtime.unet import CompiledUNet
from dmqfx.seeing.report import Report

aten = torch.ops.aten
CONFIG: Mapping[str, object] = {
    "in_channels": 4,
    "out_channels": 4,
    "sample_size": 6,
    "block_out_channels": (8, 8),
}
FIRST, SECOND, LINEAR, CAT = (
    Address.parse(text)
    for text in ("conv_in/conv2d", "block.0.conv/conv2d", "block.0.time/linear", "block.0/cat")
)


def program_of(graph: fx.Graph, constants: Mapping[str, Tensor]) -> Program:
    """A program of `sample` [B, 4, H, W] and `timestep` [B]; operations get an address if they have none."""
    for k, node in enumerate(n for n in graph.nodes if n.op == "call_function"):
        node.meta.setdefault("address", Address("block", ops.name(node), k))
    inputs = (Input("sample", ("B", 4, "H", "W")), Input("timestep", ("B",), "timestep"))
    spec = InputSpec("UNet2DModel", inputs, {"B": 2, "H": 6, "W": 8})
    gm = build(graph, constants)
    propagate(gm, spec)
    return Program(gm, spec)


def float_program() -> Program:
    """conv -> norm -> silu -> + time -> cat with its input -> conv."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "conv_in.weight": (8, 4, 3, 3), "norm.weight": (8,), "norm.bias": (8,), "time.weight": (8, 4),
        "time.bias": (8,), "conv.weight": (4, 16, 3, 3), "conv.bias": (4,), "gamma": (16, 1, 1),
    }  # fmt: skip
    constants = {name: torch.rand(shape, generator=generator) + 0.1 for name, shape in shapes.items()}
    constants["conv.weight"] = constants["conv.weight"].to(memory_format=torch.channels_last)
    graph = fx.Graph()
    call = graph.call_function
    sample, timestep = graph.placeholder("sample"), graph.placeholder("timestep")
    held = {name: graph.get_attr(name) for name in constants}
    first = call(aten.conv2d.default, (sample, held["conv_in.weight"], None, [1, 1], [1, 1]))
    normed = call(
        aten.silu.default,
        (call(aten.group_norm.default, (first, 4, held["norm.weight"], held["norm.bias"])),),
    )
    ramp = call(
        aten.arange.start,
        (1, 5),
        {"dtype": torch.float32, "device": torch.device("cpu"), "pin_memory": False},
    )
    turned = call(
        aten.sin.default, (call(aten.div.Tensor, (call(aten.unsqueeze.default, (timestep, 1)), ramp)),)
    )
    time = call(aten.linear.default, (turned, held["time.weight"], held["time.bias"]))
    spread = call(aten.unsqueeze.default, (call(aten.unsqueeze.default, (time, -1)), -1))
    both = call(aten.cat.default, ([call(aten.add.Tensor, (normed, spread)), first], 1))
    scaled = call(aten.div.Tensor, (both, held["gamma"]))
    last = call(aten.conv2d.default, (scaled, held["conv.weight"], held["conv.bias"], [1, 1], [1, 1]))
    halves = call(aten.split.Tensor, (last, 2, 1))
    graph.output(call(aten.cat.default, ([call(operator.getitem, (halves, k)) for k in (1, 0)], 1)))
    for node, address in ((first, FIRST), (time, LINEAR), (both, CAT), (last, SECOND)):
        node.meta["address"] = address
    return program_of(graph, constants)


def quantized_program() -> Program:
    """The float program with 4 bit and 8 bit layers, two timestep groups, and an entry of every kind."""
    program = float_program()
    four, eight = QuantSpec(4, "symmetric", "channel"), QuantSpec(8, boundaries=(500.0,))
    planned = {
        Site(FIRST, "weight"): Planned(four, "default"),
        Site(FIRST, "input"): Planned(replace(eight, bits=6), "first"),
        Site(SECOND, "weight"): Planned(replace(four, bits=8), "second"),
        Site(SECOND, "input"): Planned(eight, "default"),
        Site(LINEAR, "weight"): Planned(None, "time"),
        Site(LINEAR, "input"): Planned(None, "time"),
    }
    table = Table().put_all(planned).put(Site(CAT, "tensors"), SkipConcat(8, 8, deep_variance=0.5))
    for at in (FIRST, SECOND):
        table = table.put(Site(at, "input"), _range())
    table = table.put(
        Site(SECOND, "input"), LayerPair((Site(SECOND, "input"),), None, "a concatenation feeds it")
    )
    table = table.put(Site(SECOND, "input"), ChannelScale(program.weights()["gamma"].flatten()))
    planned_program = replace(program, table=table, facts=frozenset({CANONICAL, PLANNED, SCALED}))
    steps = registry.pipeline([("round-weights", {"method": "nearest"}), ("insert-qdq", {})])
    return steps.run(planned_program, PassContext())


def _range() -> Range:
    low, high = torch.tensor([[-2.0], [-1.0]]), torch.tensor([[3.0], [1.5]])
    return Range(low, high, low * 0, high, torch.tensor([[96.0], [96.0]]), 1, (500.0,))


@cache
def compiled(target: str = "auto") -> CompiledUNet:
    """The quantized program as a module, with a policy and a report."""
    report = Report("UNet2DModel", (), {981.0: 12.5, 1.0: float("inf")}, 2, 4000, 1000, ())
    return CompiledUNet(
        quantized_program(), config=CONFIG, target=target, policy=Policy.load("w4a8-quick"), report=report,
        provenance={"seed": 0, "calibration": None},
    )  # fmt: skip


def outputs(unet: CompiledUNet) -> Tensor:
    """What a module makes of fixed inputs, the two samples in different timestep groups."""
    sample = torch.randn(2, 4, 10, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return unet(sample, torch.tensor([3.0, 900.0])).sample


def same(a: object, b: object) -> bool:
    """Equality that tells 1 from 1.0 and True, -0.0 from 0.0, a list from a tuple, and holds for nan."""
    if isinstance(a, float) and isinstance(b, float):
        return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))
    if isinstance(a, slice) and isinstance(b, slice):
        return same([a.start, a.stop, a.step], [b.start, b.stop, b.step])
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return isinstance(a, list) == isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return same([list(item) for item in a.items()], [list(item) for item in b.items()])
    return type(a) is type(b) and a == b


def listing(program: Program) -> list[object]:
    """All that a graph is, as plain values."""
    return [
        [
            *(node.op, node.name, str(node.target)),
            fx.node.map_arg([node.args, node.kwargs], lambda each: f"%{each}"),
            *(str(node.meta.get("address")), str(node.meta.get("val"))),
        ]
        for node in program.graph.nodes
    ]
