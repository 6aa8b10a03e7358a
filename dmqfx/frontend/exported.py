"""From torch.export's program to our graph: named inputs, named weights, addresses, nothing else."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor, fx
from torch._ops import HigherOrderOperator
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from dmqfx.errors import CaptureError
from dmqfx.frontend.inplace import remove_inplace
from dmqfx.graph import ops
from dmqfx.graph.address import Address

__all__ = ["read"]

# What export adds to hold its own promises about sizes; ours are in the InputSpec.
_PROMISES = ("_assert_scalar", "_assert_async", "sym_constrain_range", "sym_constrain_range_for_size")
_CALL_OF_MODULE = re.compile(r"@\d+")


def read(
    exported: ExportedProgram, names: tuple[str, ...], prefix: str
) -> tuple[fx.Graph, dict[str, Tensor]]:
    """The graph of an export whose inputs are called `names`, and its weights by name without `prefix`.

    Inputs that nothing reads are left out, except the sample and the timestep.

    Raises: CaptureError where the graph changes its own buffers or holds a region that is not one operator.
    """
    _refuse_side_effects(exported, prefix)
    _drop_promises(exported.graph)
    remove_inplace(exported.graph, lambda node: path_of(node, prefix))
    held = {**exported.state_dict, **exported.constants}
    graph, copies, weights = fx.Graph(), dict[fx.Node, fx.Node](), dict[str, Tensor]()
    placeholders = list(
        zip(exported.graph_signature.input_specs, _of(exported.graph, "placeholder"), strict=True)
    )
    inputs = (node for spec, node in placeholders if spec.kind is InputKind.USER_INPUT)
    for name, node in zip(names, inputs, strict=True):
        if node.users or name in ("sample", "timestep"):
            copies[node] = graph.placeholder(name)
    for spec, node in placeholders:
        if spec.kind is not InputKind.USER_INPUT and node.users:
            target = spec.target or node.name
            copies[node] = graph.get_attr(target.removeprefix(prefix))
            weights[target.removeprefix(prefix)] = held[target].detach()
    counts: Counter[tuple[str, str]] = Counter()
    for node in _of(exported.graph, "call_function"):
        copies[node] = graph.node_copy(node, copies.__getitem__)
        copies[node].meta = {"address": _address(node, prefix, counts)}
    result = fx.node.map_arg(next(_of(exported.graph, "output")).args[0], copies.__getitem__)
    graph.output(result[0] if isinstance(result, tuple) and len(result) == 1 else result)
    return graph, weights


def path_of(node: fx.Node, prefix: str) -> str:
    """The module that a node was called in, "" for the root."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    inside = [str(path) + "." for path, _ in stack if f"{path}.".startswith(prefix)]
    return _CALL_OF_MODULE.sub("", inside[-1].removeprefix(prefix).removesuffix(".")) if inside else ""


def _address(node: fx.Node, prefix: str, counts: Counter[tuple[str, str]]) -> Address:
    key = (path_of(node, prefix), ops.name(node))
    counts[key] += 1
    return Address(*key, call=counts[key] - 1)


def _of(graph: fx.Graph, op: str) -> Iterator[fx.Node]:
    return (node for node in graph.nodes if node.op == op)


def _refuse_side_effects(exported: ExportedProgram, prefix: str) -> None:
    for spec in exported.graph_signature.output_specs:
        if spec.kind is not OutputKind.USER_OUTPUT:
            raise CaptureError(
                f"evaluation changes {spec.target}",
                address=str(spec.target or "").removeprefix(prefix),
                mend="a UNet that keeps state between calls cannot be compiled",
            )
    for node in exported.graph.nodes:
        if node.op == "get_attr" or isinstance(node.target, HigherOrderOperator):
            raise CaptureError(
                "a region with its own mode (autocast, grad mode, branch) cannot be rewritten",
                address=path_of(node, prefix),
                operator=str(node.target),
                mend="remove the region from the module's forward",
            )


def _drop_promises(graph: fx.Graph) -> None:
    """Remove size assertions and the arithmetic that only they read."""
    for node in reversed(list(graph.nodes)):
        shape_only = isinstance(
            node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool)
        )
        if ops.is_call(node, *_PROMISES) or (node.op == "call_function" and shape_only and not node.users):
            graph.erase_node(node)
