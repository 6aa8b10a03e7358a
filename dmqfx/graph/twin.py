"""Twins: the same program in another floating dtype, in tensors of its own."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, fx

from dmqfx.graph.inputs import InputSpec
from dmqfx.graph.modules import clone, constants, propagate
from dmqfx.graph.table import Table

_Entry = TypeVar("_Entry")


def twin_module(
    gm: fx.GraphModule, inputs: InputSpec, dtype: torch.dtype
) -> tuple[fx.GraphModule, InputSpec]:
    """Graph and inputs with all floating tensors in `dtype`; casts inside the graph to a working dtype follow."""
    floating = {i.dtype for i in inputs.inputs if i.dtype.is_floating_point} | {torch.float32, torch.float64}
    twin = clone(gm, {name: _cast(tensor, dtype) for name, tensor in constants(gm).items()})

    def follow(value: fx.node.Argument) -> fx.node.Argument:
        return dtype if isinstance(value, torch.dtype) and value in floating else value

    for node in twin.graph.nodes:
        if node.op == "call_function":
            node.args = fx.node.map_aggregate(node.args, follow)
            node.kwargs = fx.node.map_aggregate(node.kwargs, follow)
    twin.recompile()
    cast = tuple(replace(i, dtype=dtype) if i.dtype.is_floating_point else i for i in inputs.inputs)
    spec = replace(inputs, inputs=cast)
    propagate(twin, spec)
    return twin, spec


def twin_table(table: Table, dtype: torch.dtype) -> Table:
    """The table with the floating tensors of all entries in `dtype`."""
    found = Table()
    for site, entry in table:
        found = found.put(site, _cast_entry(entry, dtype))
    return found


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to(dtype, copy=True) if tensor.is_floating_point() else tensor.detach().clone()


def _cast_entry(entry: _Entry, dtype: torch.dtype) -> _Entry:
    if not is_dataclass(entry) or isinstance(entry, type):
        return entry
    changed: dict[str, object] = {}
    for f in fields(entry):
        value = getattr(entry, f.name)
        changed[f.name] = _cast(value, dtype) if isinstance(value, Tensor) else _cast_entry(value, dtype)
    return replace(entry, **changed)
