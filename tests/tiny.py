"""Two convolutions, written down by hand: what is planned, quantized and printed can be checked by eye."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

import dmqfx.runtime.operators  # noqa: F401  # registers torch.ops.dmqfx, which the passes insert
from dmqfx.graph import registry
from dmqfx.graph.address import Address, Site
from dmqfx.graph.facts import CALIBRATED, CANONICAL, PLANNED, SCALED
from dmqfx.graph.inputs import Input, InputSpec
from dmqfx.graph.journal import Application, PassRecord, Refusal
from dmqfx.graph.modules import build, clone, propagate
from dmqfx.graph.pipeline import PassContext
from dmqfx.graph.program import Program
from dmqfx.graph.table import ChannelScale, LayerPair, Planned, Range, SkipConcat, Table
from dmqfx.numbers.quant import QuantSpec

aten = torch.ops.aten
IN, OUT = Address("conv_in", "conv2d"), Address("out", "conv2d")


def plain() -> Program:
    """conv -> silu -> cat with the convolution's own output -> conv."""
    weights = {
        "conv_in.weight": torch.arange(-4.0, 4.0).reshape(2, 1, 2, 2) / 7,
        "conv_in.bias": torch.ones(2),
        "out.weight": torch.tensor([1.0, -0.5, 0.25, 2.0]).reshape(1, 4, 1, 1),
    }
    graph = fx.Graph()
    sample, _ = graph.placeholder("sample"), graph.placeholder("timestep")
    held = {name: graph.get_attr(name) for name in weights}
    first = graph.call_function(
        aten.conv2d.default, (sample, held["conv_in.weight"], held["conv_in.bias"], [1, 1], [1, 1])
    )
    silu = graph.call_function(aten.silu.default, (first,))
    both = graph.call_function(aten.cat.default, ([silu, first], 1))
    last = graph.call_function(aten.conv2d.default, (both, held["out.weight"]))
    graph.output(last)
    for node, at in ((first, IN), (silu, Address("act", "silu")), (both, Address("out", "cat")), (last, OUT)):
        node.meta["address"] = at
    inputs = (Input("sample", ("B", 1, "H", "W")), Input("timestep", ("B",), "timestep"))
    spec, gm = InputSpec("Tiny", inputs, {"B": 2, "H": 3, "W": 3}), build(graph, weights)
    propagate(gm, spec)
    return Program(gm, spec, facts=frozenset({CANONICAL}))


def planned() -> Program:
    """The same, with what a policy asks of it and what calibration saw."""
    low, high = torch.tensor([[-2.0], [-1.0]]), torch.tensor([[3.0], [1.5]])
    count = torch.tensor([18, 0])
    seen = Range(low, high, low * 0, high, count, 1, (500.0,))
    weight, eight = QuantSpec(4, "symmetric", "channel"), QuantSpec(8, boundaries=(500.0,))
    table = Table().put_all(
        {
            Site(IN, "input"): Planned(eight, "default"),
            Site(IN, "weight"): Planned(weight, "default"),
            Site(OUT, "input"): Planned(None, "ends"),
            Site(OUT, "weight"): Planned(QuantSpec(8, "symmetric"), "last"),
        }
    )
    table = table.put(Site(IN, "input"), seen).put(Site(Address("out", "cat"), "tensors"), SkipConcat(2, 2))
    table = table.put(Site(IN, "input"), LayerPair((Site(IN, "input"),), None, "an input feeds it"))
    table = table.put(Site(IN, "input"), ChannelScale(torch.tensor([0.5])))
    log = (
        PassRecord("pair-layers", "bitwise", (Application(IN, "pair", "1 reader"),), (), 0.1),
        PassRecord("absorb-scaling", "exact", (), (Refusal(IN, "absorb", "an input feeds it"),), 0.1),
    )
    return replace(plain(), table=table, log=log, facts=frozenset({CANONICAL, PLANNED, CALIBRATED, SCALED}))


def quantized() -> Program:
    """The same, quantized by the built-in passes."""
    return registry.pipeline([("round-weights", {"method": "nearest"}), ("insert-qdq", {})]).run(
        planned(), PassContext()
    )


def changed(program: Program, **weights: torch.Tensor) -> Program:
    """The same graph over other constants."""
    named = {name.replace("_weight", ".weight"): value for name, value in weights.items()}
    return replace(program, gm=clone(program.gm, {**program.weights(), **named}))
