"""Values and graphs as JSON: what was written comes back, and nothing else is believed."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from handmade import listing, program_of, quantized_program, same
from hypothesis import given
from hypothesis import strategies as st
from torch import fx

from dmqfx.errors import StoreError
from dmqfx.graph.address import Address, Site
from dmqfx.graph.program import Program
from dmqfx.numbers.quant import QuantSpec
from dmqfx.storage.codec import Json, decode, dump, encode, parse
from dmqfx.storage.graphfile import read_program, write_graph

aten = torch.ops.aten


# --- values

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int8, torch.uint8, torch.bool]),
    st.sampled_from([torch.strided, torch.preserve_format, torch.channels_last, torch.device("cpu")]),
    st.sampled_from([Site.parse("conv_in/conv2d:weight"), Address.parse("a.0/add#2~step.1"), QuantSpec(4)]),
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=3), inner, max_size=3),
        st.builds(slice, inner, inner, inner),
    ),
    max_leaves=8,
)


def test_the_comparison_of_values_has_teeth() -> None:
    different = [
        1,
        1.0,
        True,
        0.0,
        -0.0,
        None,
        "1",
        [1],
        (1,),
        {"a": 1},
        {"a": 2},
        math.nan,
        slice(1),
        slice(1.0),
    ]
    assert [sum(same(a, b) for b in different) for a in different] == [1] * len(different)


@given(values)
def test_values_come_back_from_json(value: object) -> None:
    text = dump({"value": encode(value)})
    assert same(decode(parse(text, "a.json")["value"]), value)
    assert dump(parse(text, "a.json")) == text


def test_what_json_cannot_say_is_refused() -> None:
    for value in (1j, object(), {1, 2}, torch.ones(1)):
        with pytest.raises(StoreError, match="cannot be stored"):
            encode(value)
    for written in (
        {"dtype": "save"},
        {"float": "many"},
        {"QuantSpec": {"colour": 4}},
        {"a": 1, "b": 2},
        {"x": 1},
    ):
        with pytest.raises(StoreError):
            decode(written)


# --- graphs


def again(program: Program) -> Program:
    """A program, written as JSON and read."""
    return read_program(parse(dump(write_graph(program)), "graph.json"), program.weights())


def step(graph: fx.Graph, x: fx.Node, kind: str, a: float, n: int) -> fx.Node:
    """One operation; between them they have arguments of every kind."""
    call = graph.call_function
    match kind:
        case "add":
            return call(aten.add.Tensor, (x, x), {"alpha": n})
        case "clamp":
            return call(aten.clamp.default, (x, None, a))
        case "cast":
            formats = {"dtype": torch.float64, "memory_format": torch.preserve_format}
            return call(aten.mul.Scalar, (call(aten._to_copy.default, (x,), formats), a))
        case "mean":
            return call(aten.mean.dim, (x, [2, 3], True))
        case "split":
            return call(operator.getitem, (call(aten.split.Tensor, (x, 3, 1)), -1))
        case "pad":
            return call(aten.pad.default, (x, [0, 0, 0, 0, 0, n], "constant", a))
        case "cat":
            return call(aten.cat.default, ([x, x], 1))
        case "slice":
            return call(aten.slice.Tensor, (x, 1, 0, 4))
        case _:
            ramp = call(aten.arange.default, (n,), {"device": torch.device("cpu"), "pin_memory": False})
            return call(aten.add.Tensor, (x, call(aten.sum.default, (ramp,))))


KINDS = ["add", "clamp", "cast", "mean", "split", "pad", "cat", "slice", "arange"]
numbers = st.floats(-3, 3) | st.sampled_from([math.inf, -math.inf, math.nan, -0.0])


@given(st.lists(st.tuples(st.sampled_from(KINDS), numbers, st.integers(1, 3)), max_size=6))
def test_graphs_come_back_from_json(steps: list[tuple[str, float, int]]) -> None:
    graph = fx.Graph()
    x = graph.placeholder("sample")
    graph.placeholder("timestep")
    for kind, a, n in steps:
        x = step(graph, x, kind, a, n)
    graph.output(x)
    program = program_of(graph, {})
    read = again(program)
    assert same(listing(read), listing(program))
    assert read.inputs == program.inputs
    assert dump(write_graph(read)) == dump(write_graph(program))
    inputs = program.inputs.draw(torch.Generator().manual_seed(0))
    assert torch.equal(torch.nan_to_num(read(**inputs)), torch.nan_to_num(program(**inputs)))


def test_the_listing_of_graphs_has_teeth() -> None:
    first, second = quantized_program(), quantized_program()
    assert same(listing(first), listing(second))
    conv = second.node("conv_in/conv2d")
    conv.args = (*conv.args[:-1], [1.0, 1.0])
    assert not same(listing(first), listing(second))


def altered(change: Callable[[dict[str, Any]], object], at: str = "conv_in/conv2d") -> dict[str, Json]:
    """The written graph of a program, after a change of the node at an address."""
    document = parse(dump(write_graph(quantized_program())), "graph.json")
    change(next(node for node in document["nodes"] if node.get("address", node["name"]) == at))
    return document


FORBIDDEN = """aten.from_file.default aten.save.default aten.nothing.default prims.add.default posix.system
    operator.call operator.__import__ builtins.eval"""


@pytest.mark.parametrize("target", FORBIDDEN.split())
def test_a_graph_cannot_call_what_is_not_an_operator(target: str) -> None:
    document = altered(lambda node: node.update(target=target))
    with pytest.raises(StoreError, match=re.escape(repr(target))):
        read_program(document, quantized_program().weights())


EVIL = "x; __import__('os').abort()"


@pytest.mark.parametrize(
    ("at", "change"),
    [
        ("conv_in/conv2d", {"name": EVIL}),
        ("conv_in/conv2d", {"name": "sample"}),
        ("conv_in/conv2d", {"name": "while"}),
        ("conv_in/conv2d", {"kwargs": {EVIL: 1}}),
        ("conv_in/conv2d", {"args": [{"node": "later"}]}),
        ("conv_in/conv2d", {"args": [{"node": "sample"}, {"tensor": "a"}]}),
        ("conv_in/conv2d", {"args": [{"node": "sample"}]}),
        ("conv_in/conv2d", {"args": 1}),
        ("conv_in/conv2d", {"address": "nowhere"}),
        ("conv_in/conv2d", {"op": "call_module", "target": "conv_in"}),
        ("conv_in/conv2d", {"op": "call_method", "target": "add_"}),
        ("sample", {"target": EVIL}),
        ("sample", {"target": "latent"}),
        ("norm_weight", {"target": EVIL}),
        ("norm_weight", {"target": "norm.gain"}),
        ("norm_weight", {"target": '"), __import__("os").abort(), ("'}),
        ("output", {"op": "placeholder"}),
    ],
)  # fmt: skip
def test_a_graph_that_says_anything_else_is_refused(at: str, change: dict[str, Json]) -> None:
    document = altered(lambda node: node.update(change), at)
    with pytest.raises(StoreError):
        read_program(document, quantized_program().weights())


@pytest.mark.parametrize(("at", "value"), [(1, 4.0), (2, 4.0), (4, "1"), (4, 0.5)])
def test_operators_of_ours_get_what_their_schema_says(at: int, value: Json) -> None:
    document = altered(lambda node: node["args"].__setitem__(at, value), "conv_in/dequantize~insert-qdq.2")
    with pytest.raises(StoreError, match=r"dequantize\(\)"):
        read_program(document, quantized_program().weights())


def test_only_what_can_be_read_is_written() -> None:
    graph = fx.Graph()
    x = graph.placeholder("sample")
    graph.placeholder("timestep")
    graph.output(graph.call_function(torch.sin, (x,)))
    program = program_of(graph, {})
    with pytest.raises(StoreError, match=r"block/sin: call_function of .*sin.* cannot be stored"):
        write_graph(program)
