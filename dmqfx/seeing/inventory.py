"""What a program computes with: every layer's shape, weights, multiply-accumulates and bits."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, fx

from dmqfx.graph import ops
from dmqfx.graph.address import Address
from dmqfx.graph.program import Program
from dmqfx.seeing import wording
from dmqfx.seeing.bits import RUN_TIME, SiteBits, layers, site_bits, sites
from dmqfx.seeing.selection import select

__all__ = ["Item", "inventory", "listing", "macs", "weight_shape"]

_LOWERING = ("choose-forms", "lower-reference", "lower-cpu", "lower-float")

# Products that are counted but have no sites: attention spelled out, and layers that few UNets use.
_OTHERS = ("addmm", "baddbmm", "bmm", "conv1d", "conv3d", "conv_transpose2d", "matmul", "mm")


@dataclass(frozen=True)
class Item:
    """One operation that multiplies; without `sites` it always stays float.

    `op` is the operator; `because` is what lowering passes chose or refused there, with the reason.

    Units: macs per sample at the program's example sizes; share of all multiply-accumulates, 0 to 1.
    """

    address: Address
    shape: tuple[int, ...]
    weight: tuple[int, ...] | None
    parameters: int
    macs: int
    share: float
    sites: tuple[SiteBits, ...]
    op: str
    because: tuple[str, ...]


def inventory(program: Program, at: str = "**") -> list[Item]:
    """Every convolution, linear layer, attention and other product, in execution order.

    Raises: AddressError if no operation fits the glob.
    """
    calls = {node.meta["address"]: node for node in program.calls()}
    wanted = select(calls, at)
    found = layers(program) | {a: node for a, node in calls.items() if ops.is_call(node, *_OTHERS)}
    costs = {a: macs(node) // program.inputs.sizes.get("B", 1) for a, node in calls.items() if a in found}
    total = max(sum(costs.values()), 1)
    return [_item(program, found[a], cost, cost / total) for a, cost in costs.items() if a in wanted]


def macs(node: fx.Node) -> int:
    """Multiply-accumulates of one call at the example sizes: outputs times the length of the sum behind each.

    Attention is the product of queries and keys and that of the softmax and values, in one operation or in two.
    """
    named = ops.args(node)
    if ops.is_call(node, "attention_softmax"):
        return math.prod(_shape(node)) * _shape(named["query"])[-1]
    if ops.is_call(node, "attention_average"):
        return math.prod(_shape(node)) * _shape(named["softmax"])[-1]
    if ops.is_call(node, "scaled_dot_product_attention", "kernel_sdpa", *RUN_TIME):
        query, key, value = (_shape(named[arg]) for arg in ("query", "key", "value"))
        return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
    weight, outputs = weight_shape(node), math.prod(_shape(node))
    if weight is not None:
        transposed = ops.is_call(node, "conv_transpose2d")
        return (math.prod(_shape(named["input"])) if transposed else outputs) * math.prod(weight[1:])
    left = next((named[arg] for arg in ("mat1", "batch1", "self") if arg in named), None)
    return outputs * (_shape(left) or (0,))[-1]


def weight_shape(node: fx.Node) -> tuple[int, ...] | None:
    """The shape of a layer's weight, packed or not; None if it has none."""
    named = ops.args(node)
    packed = named.get("weight_shape")
    if isinstance(packed, (list, tuple)):
        return tuple(size for size in packed if isinstance(size, int))
    return _shape(named.get("weight")) or None


def listing(items: list[Item], *, lowered: bool = False) -> str:
    """Items as a table for a terminal, with the sums below; bits are shown once a policy has planned them.

    Of a `lowered` program it has what each runs as, and why.
    """
    rows = [["layer", "output", "weight", "parameters", "MACs", "share", "bits", "runs as"]]
    rows += [_row(item) for item in items]
    total = sum(item.macs for item in items)
    parameters, share = sum(item.parameters for item in items), sum(item.share for item in items)
    rows.append(
        [f"{len(items)} layers", "", "", f"{parameters:,}", wording.count(total), f"{share:.1%}", "", ""]
    )
    planned = any(site.rule for item in items for site in item.sites)
    columns = [0, 1, 2, 3, 4, 5, *[6] * planned, *[7] * lowered]
    return wording.columns([[row[k] for k in columns] for row in rows], right=frozenset({3, 4, 5}))


def _item(program: Program, node: fx.Node, cost: int, share: float) -> Item:
    at, weight = node.meta["address"], weight_shape(node)
    known = tuple(site_bits(program, site) for site in sites(at))
    parameters = sum(math.prod(shape) for shape in (weight, _shape(ops.args(node).get("bias"))) if shape)
    return Item(
        at, _shape(node), weight, parameters, cost, share, known, ops.name(node), _because(program, at)
    )


def _because(program: Program, at: Address) -> tuple[str, ...]:
    """What lowering did there that is not the rule."""
    here = [
        (done.name, each)
        for done in program.log
        if done.name in _LOWERING
        for each in done.refused
        if each.at == at
    ]
    chosen = [
        each.what
        for done in program.log
        if done.name == "choose-forms"
        for each in done.applied
        if each.at == at
    ]
    return *chosen, *(f"{name}: {each.reason}" for name, each in here)


def _row(item: Item) -> list[str]:
    output, weight = ("x".join(map(str, shape)) for shape in (item.shape[1:], item.weight or ()))
    said = "  ".join(map(_said, item.sites)) if item.sites else "float: not quantizable"
    counts = [f"{item.parameters:,}", wording.count(item.macs), f"{item.share:.1%}"]
    runs_as = "; ".join([item.op, *item.because])
    return [str(item.address), output, weight, *counts, said, runs_as]


def _said(found: SiteBits) -> str:
    """The bits a site has or, before any is quantized, the bits it will get; and the rule that decided."""
    asked = found.asked.bits if found.asked else None
    return f"{found.site.arg} {found.got or asked or 'float'} ({found.rule})"


def _shape(value: object) -> tuple[int, ...]:
    found = value.meta["val"] if isinstance(value, fx.Node) else None
    return tuple(int(size) for size in found.shape) if isinstance(found, Tensor) else ()
