"""fx graphs as JSON and back. Only known operators come back: a file cannot make anything else run."""

from __future__ import annotations

import keyword
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

import dmqfx.runtime.operators  # noqa: F401  # registers torch.ops.dmqfx, which graphs name
from dmqfx.errors import DmqfxError, StoreError
from dmqfx.graph import ops
from dmqfx.graph.address import Address
from dmqfx.graph.inputs import InputSpec
from dmqfx.graph.invariants import check_structure
from dmqfx.graph.modules import build, constant, propagate
from dmqfx.graph.program import Program
from dmqfx.numbers import packing
from dmqfx.storage.codec import Json, decode, encode

__all__ = ["NAMESPACES", "PYTHON", "read_program", "strides", "write_graph"]

NAMESPACES: Final = ("aten", "dmqfx")
PYTHON: Final[Mapping[str, Callable[..., object]]] = {
    f"operator.{function.__name__}": function
    for function in (
        operator.add, operator.floordiv, operator.getitem, operator.mod,
        operator.mul, operator.neg, operator.sub, operator.truediv,
    )
}  # fmt: skip
"""The functions outside torch.ops that a graph may call."""
_WEIGHT = re.compile(r"\w+(\.\w+)*", re.ASCII)


def write_graph(program: Program) -> dict[str, Json]:
    """The inputs and the nodes of a program. Devices are written as the CPU, where a program is loaded.

    Raises: StoreError for a module call, and an operator or an argument that may not be stored.
    """
    return {
        "inputs": encode(program.inputs),
        "nodes": [_write_node(node, program.gm) for node in program.graph.nodes],
    }


def read_program(document: Mapping[str, Json], constants: Mapping[str, Tensor]) -> Program:
    """The program of a written graph over these constants, checked as after a pass; no table, facts or log.

    Raises: StoreError for whatever `write_graph` does not write, or a graph that does not fit its constants.
    """
    inputs, nodes = decode(document.get("inputs")), document.get("nodes")
    if not isinstance(inputs, InputSpec) or not isinstance(nodes, list):
        raise StoreError("there are no inputs and nodes")
    graph = _Reader(constants).graph(nodes)
    _check_inputs(graph, inputs)
    used = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    try:
        gm = build(graph, {name: tensor for name, tensor in constants.items() if name in used})
        propagate(gm, inputs)
        program = Program(gm, inputs)
        check_structure(program, "load")
    except (DmqfxError, RuntimeError, TypeError, ValueError, KeyError, IndexError) as error:
        raise StoreError(f"the graph does not run at its example sizes: {error}") from error
    _check_codes(program)
    return program


def _check_codes(program: Program) -> None:
    """Raise StoreError for codes of more bits than the graph says; those of 4 and 8 bits fill what they are packed in."""
    for node in program.calls("unpack"):
        named = ops.args(node)
        held, bits = named["packed"], named["bits"]
        if (
            not isinstance(held, fx.Node)
            or held.op != "get_attr"
            or not isinstance(bits, int)
            or bits in (4, 8)
        ):
            continue
        packed = constant(program.gm, str(held.target))
        count = packed.numel() * (2 if bits < 4 else 1)  # half a byte that is left over is 0, which fits
        try:
            packing.check(packing.unpack(packed, bits, bool(named["signed"]), (count,)), bits)
        except ValueError as error:
            raise StoreError(f"{node.meta['address']}, {held.target}: {error}") from error


def _write_node(node: fx.Node, gm: fx.GraphModule) -> Json:
    record: dict[str, Json] = {"op": node.op, "name": node.name}
    if node.op != "output":
        record["target"] = _target_name(node)
    if node.op == "get_attr" and (stride := _stride(constant(gm, str(node.target)))):
        record["stride"] = [*stride]
    if node.args:
        record["args"] = [_write_argument(value) for value in node.args]
    if node.kwargs:
        record["kwargs"] = {key: _write_argument(value) for key, value in node.kwargs.items()}
    if "address" in node.meta:
        record["address"] = str(node.meta["address"])
    return record


def _write_argument(value: fx.node.Argument) -> Json:
    cpu = torch.device("cpu")
    portable = fx.node.map_aggregate(value, lambda each: cpu if isinstance(each, torch.device) else each)
    return encode(portable, lambda each: {"node": each.name} if isinstance(each, fx.Node) else None)


def _target_name(node: fx.Node) -> str:
    name = str(node.target)
    if node.op == "placeholder" or (node.op == "get_attr" and _WEIGHT.fullmatch(name)):
        return name
    if isinstance(node.target, OpOverload):
        _function(name)
        return name
    found = next((name for name, function in PYTHON.items() if function is node.target), None)
    if found is None:
        raise StoreError(f"{node.meta.get('address', node.name)}: {node.op} of {name} cannot be stored")
    return found


def _function(name: str) -> Callable[..., object]:
    """The operator of a name, if a file may name it: it computes from its arguments and touches no file.

    Raises: StoreError if not.
    """
    if name in PYTHON:
        return PYTHON[name]
    if name.partition(".")[0] not in NAMESPACES:
        raise StoreError(
            f"operator {name!r} is not one that a stored graph may call; those are"
            f" {', '.join(f'{each}.*' for each in NAMESPACES)} and {', '.join(PYTHON)}"
        )
    try:
        found = ops.overload(name)
    except ValueError as error:
        raise StoreError(f"{error}; update torch or dmqfx, or compile the model again") from error
    silent = not found._schema.returns and not name.startswith("aten._assert_")
    if silent or any(argument.name == "filename" for argument in found._schema.arguments):
        raise StoreError(f"operator {name!r} does more than compute, and a stored graph may not call it")
    return found


class _Reader:
    """Builds one graph from its node records."""

    def __init__(self, constants: Mapping[str, Tensor]) -> None:
        self._constants = constants
        self._graph = fx.Graph()
        self._nodes: dict[str, fx.Node] = {}

    def graph(self, records: Sequence[Json]) -> fx.Graph:
        """The graph of these records.

        Raises: StoreError naming the node that is wrong.
        """
        for k, record in enumerate(records):
            if not isinstance(record, dict):
                raise StoreError(f"node {k} is not an object")
            try:
                self._add(record)
            except (StoreError, KeyError, TypeError, ValueError) as error:
                raise StoreError(f"node {k} ({record.get('name')}): {error}") from error
        if [node.op == "output" for node in self._graph.nodes] != [False] * (len(records) - 1) + [True]:
            raise StoreError("the graph does not end in its output")
        return self._graph

    def _add(self, record: Mapping[str, Json]) -> None:
        op, name, address = record["op"], record["name"], record.get("address")
        if not isinstance(op, str) or not isinstance(name, str):
            raise StoreError("op and name must be words")
        args = decode(record.get("args", []), self._read)
        kwargs = record.get("kwargs", {})
        if not isinstance(args, list) or not isinstance(kwargs, dict):
            raise StoreError("args must be a list and kwargs an object")
        if not all(map(_is_word, kwargs)):
            raise StoreError(f"{list(kwargs)} are not names of arguments")
        named = {key: decode(value, self._read) for key, value in kwargs.items()}
        node = self._graph.create_node(op, self._target(op, record), tuple(args), named, name)  # type: ignore[arg-type]  # decoded arguments are what fx takes
        if node.name != name:
            raise StoreError("is not a name of its own")
        self._nodes[name] = node
        if isinstance(address, str):
            node.meta["address"] = Address.parse(address)

    def _target(self, op: str, record: Mapping[str, Json]) -> str | Callable[..., object]:
        target = str(record.get("target", "output"))
        if op == "call_function":
            return _function(target)
        if op == "placeholder" and _is_word(target):
            return target
        if op == "get_attr" and _WEIGHT.fullmatch(target):
            if target not in self._constants:
                raise StoreError(f"there is no tensor {target!r}")
            return target
        if op == "output" and target == "output":
            return target
        raise StoreError(f"{op} of {target!r} is not allowed")

    def _read(self, word: str, content: Json) -> object:
        if word != "node" or not isinstance(content, str):
            raise StoreError(f"unknown tag {word!r}")
        if content not in self._nodes:
            raise StoreError(f"reads {content!r}, which does not come before it")
        return self._nodes[content]


def strides(document: Mapping[str, Json]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The constants that are not laid out row by row, and their strides."""
    nodes = document.get("nodes")
    for record in nodes if isinstance(nodes, list) else ():
        if isinstance(record, dict) and isinstance(stride := record.get("stride"), list):
            yield str(record.get("target")), tuple(each for each in stride if isinstance(each, int))


def _stride(tensor: Tensor) -> tuple[int, ...] | None:
    """The stride of a tensor that is dense, but not laid out row by row (channels_last)."""
    if tensor.is_contiguous():
        return None
    expected = 1
    for size, step in sorted(
        zip(tensor.shape, tensor.stride(), strict=True), key=lambda pair: (pair[1], pair[0])
    ):
        if size != 1 and step != expected:
            return None
        expected *= size if size != 1 else 1
    return tuple(tensor.stride())


def _is_word(text: str) -> bool:
    """Whether a text can stand in generated code as a name, and as nothing else."""
    return text.isidentifier() and not keyword.iskeyword(text)


def _check_inputs(graph: fx.Graph, inputs: InputSpec) -> None:
    given = [str(node.target) for node in graph.nodes if node.op == "placeholder"]
    if given != [i.name for i in inputs.inputs]:
        raise StoreError(f"the graph takes {given}, but its inputs are {[i.name for i in inputs.inputs]}")
