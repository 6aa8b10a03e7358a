"""One operation as one line of text, in pieces that can be compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from dmqfx.graph import ops
from dmqfx.graph.address import Address
from dmqfx.graph.modules import constant, label
from dmqfx.graph.program import Program
from dmqfx.seeing import wording

__all__ = ["Line", "Part", "lines"]


@dataclass(frozen=True)
class Part:
    """A piece of a line in words; `value` is what stands behind them, where words do not say everything."""

    words: str
    value: object = None

    def same(self, other: Part) -> bool:
        """Whether both say the same and mean the same numbers."""
        return self.words == other.words and _equal(self.value, other.value)


@dataclass(frozen=True)
class Line:
    """One operation: arguments by schema name, output shape, and notes: table entries by "site kind"."""

    at: Address
    op: str
    arguments: Mapping[str, Part]
    shape: str
    notes: Mapping[str, Part]

    @property
    def call(self) -> str:
        """The call and the shape of what it returns."""
        read = ", ".join(f"{arg}={part.words}" for arg, part in self.arguments.items())
        return f"{self.op}({read}) -> {self.shape}"

    def __str__(self) -> str:
        said: dict[str, list[str]] = {}
        for key, part in self.notes.items():
            said.setdefault(key.partition(" ")[0], []).append(part.words)
        notes = "".join(f"  ! {arg}: {' | '.join(words)}" for arg, words in said.items())
        return f"{self.at}  {self.call}{notes}"


def lines(program: Program, usual: torch.dtype | None = None) -> dict[Address, Line]:
    """A line for every operation, in execution order; dtypes are written where they are not the usual one."""
    notes: dict[Address, dict[str, Part]] = {}
    for site, found in program.table:
        notes.setdefault(site.at, {})[f"{site.arg} {type(found).__name__}"] = Part(
            wording.entry(found), found
        )
    known = usual or program.dtype
    calls = {node.meta["address"]: node for node in program.calls()}
    return {at: _line(program, node, known, notes.get(at, {})) for at, node in calls.items()}


def _line(program: Program, node: fx.Node, usual: torch.dtype, notes: Mapping[str, Part]) -> Line:
    defaults = _defaults(node)
    said = {
        arg: value
        for arg, value in ops.args(node).items()
        if arg not in defaults or repr(value) != repr(defaults[arg])
    }
    arguments = {arg: _argument(program, value, usual) for arg, value in said.items()}
    return Line(
        node.meta["address"], ops.name(node), arguments, wording.shape(node.meta["val"], usual), notes
    )


def _argument(program: Program, value: fx.node.Argument, usual: torch.dtype) -> Part:
    def named(read: fx.Node) -> str:
        return label(read) + (f" {wording.shape(read.meta['val'], usual)}" if read.op == "get_attr" else "")

    fixed = isinstance(value, fx.Node) and value.op == "get_attr"
    return Part(
        wording.argument(value, named),
        constant(program.gm, str(value.target)) if fixed and isinstance(value, fx.Node) else None,
    )


def _defaults(node: fx.Node) -> dict[str, fx.node.Argument]:
    if not isinstance(node.target, OpOverload):
        return {}
    schema = node.target._schema.arguments
    return {each.name: ops.default_of(each) for each in schema if each.has_default_value()}


def _equal(a: object, b: object) -> bool:
    """Whether two constants or entries hold the same numbers."""
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        alike = (a.shape, a.dtype) == (b.shape, b.dtype)
        return alike and (_same_memory(a, b) or torch.equal(a.to(b.device), b))
    if isinstance(a, float) and isinstance(b, float):
        return a == b or (a != a and b != b)
    if is_dataclass(a) and type(a) is type(b):
        return all(_equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    return a == b


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return (a.data_ptr(), a.stride(), a.device) == (b.data_ptr(), b.stride(), b.device)
