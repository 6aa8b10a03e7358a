"""Where a per-channel factor on a tensor can go: back through operators that keep channels apart, into a weight.

The layout operators on the way (reshape, permute, chunk, attention's heads, ...) are not modelled: the row numbers of the
producer are sent through them, and what arrives tells which row became which channel.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from dmqfx.graph import ops
from dmqfx.graph.address import Site
from dmqfx.graph.modules import call_with, is_fixed, label
from dmqfx.graph.rewrite import Refuse
from dmqfx.graph.table import Planned, Table

LAYOUT = (
    "reshape",
    "view",
    "_unsafe_view",
    "permute",
    "transpose",
    "contiguous",
    "clone",
    "flatten",
    "unflatten",
)
AVERAGES = ("scaled_dot_product_attention", "attention_average")
CHANNEL_OF_ROW = {"group_norm": 1, "layer_norm": -1, "linear": -1, "conv2d": 1}


@dataclass(frozen=True, eq=False)
class Absorber:
    """An operation whose weight and bias can take a per-channel factor of a tensor made from it, exactly.

    Shapes: rows [C] holds, for each channel of that tensor, the row of the operation's weight and bias that makes it.
    """

    node: fx.Node
    rows: Tensor

    def spread(self, factor: Tensor) -> Tensor:
        """A factor [C] of the tensor as a factor [rows] of the weight; rows of other channels get 1."""
        count = ops.tensor(self.node, "weight").meta["val"].shape[0]
        return torch.ones(count, dtype=factor.dtype, device=factor.device).index_put(
            (self.rows.to(factor.device),), factor
        )


def divisor(node: object) -> tuple[fx.Node, fx.Node, int] | None:
    """(x, gamma, axis) of x / gamma, where gamma is a constant with one number for each entry of one axis of x."""
    if not isinstance(node, fx.Node) or not ops.is_call(node, "div"):
        return None
    named = ops.args(node)
    x, gamma = named["self"], named["other"]
    if not isinstance(x, fx.Node) or not isinstance(gamma, fx.Node) or named.get("rounding_mode") is not None:
        return None
    size, shape = x.meta["val"].shape, gamma.meta["val"].shape
    padded = (1,) * (len(size) - len(shape)) + tuple(shape)
    wide = [k for k, count in enumerate(padded) if count > 1] or [1 if len(size) == 4 else len(size) - 1]
    if gamma.op != "get_attr" or len(padded) != len(size) or len(wide) > 1 or wide[0] == 0:
        return None
    axis = wide[0]
    fits = padded[axis] == size[axis]
    return (x, gamma, axis if (axis, len(size)) == (1, 4) else axis - len(size)) if fits else None


def absorber(source: fx.Node, axis: int, table: Table) -> Absorber | Refuse:
    """Who can absorb a per-channel factor of `source` (channels on `axis`), or why nobody can."""
    way = _way_back(source)
    if isinstance(way, Refuse):
        return way
    if (quantized := _quantized_between(way, table)) is not None:
        return Refuse(f"{quantized} is quantized, in the range of the unscaled tensor", way[-1])
    arrived = _send_rows(way)
    rows = arrived.movedim(axis, 0).flatten(1)
    if rows.shape[1] == 0 or not bool((rows == rows[:, :1]).all()):
        return Refuse(f"the channels of {label(way[0])} do not arrive as channels", way[0])
    order = rows[:, 0].long()
    if len(set(order.tolist())) != order.numel():
        return Refuse(f"one row of {label(way[0])} makes several channels", way[0])
    return Absorber(way[0], order)


def _quantized_between(way: list[fx.Node], table: Table) -> Site | None:
    """The first site on the way (attention's value) that is planned to be quantized."""
    for before, node in pairwise(way):
        for arg, value in ops.args(node).items():
            planned = table.get(Site(node.meta["address"], arg), Planned) if value is before else None
            if planned is not None and planned.spec is not None:
                return Site(node.meta["address"], arg)
    return None


def _way_back(source: fx.Node) -> list[fx.Node] | Refuse:
    """The operations from a weighted producer to `source`, each read by the next alone."""
    name = ops.name(source)
    if name in CHANNEL_OF_ROW:
        fixed = is_fixed(ops.args(source).get("weight"))
        return [source] if fixed else Refuse(f"{label(source)} has no weight that can be changed", source)
    steps = _inputs(source)
    if not steps:
        return Refuse(f"{label(source) or 'an input'} mixes channels or is not linear in them", source)
    first: Refuse | None = None
    for step in steps:
        if sum(read is step for read in tree_leaves((source.args, source.kwargs))) > 1:
            return Refuse(f"{label(source)} reads {label(step)} more than once", source)
        shared = [user for user in step.users if user is not source]
        way = _also_read(step, shared[0]) if shared and not _takes_a_part(source) else _way_back(step)
        if not isinstance(way, Refuse):
            return [*way, source]
        first = first or way
    assert first is not None  # steps is not empty
    return first


def _inputs(node: fx.Node) -> list[fx.Node]:
    """The arguments in which an operation is linear, channel by channel."""
    name = ops.name(node)
    if name in LAYOUT:
        return [ops.tensor(node, "self" if "self" in ops.parameters(node) else "input")]
    if name == "upsample_nearest2d":
        return [ops.tensor(node, "input")]
    if name in AVERAGES:
        return [ops.tensor(node, "value")]
    if _takes_a_part(node):
        return [node.all_input_nodes[0]]
    if name in ("chunk", "split", "split_with_sizes"):
        return [node.all_input_nodes[0]]
    if name == "mul":
        return [value for value in ops.args(node).values() if isinstance(value, fx.Node)]
    return []


def _takes_a_part(node: fx.Node) -> bool:
    """Whether this picks one piece of a chunk: the other pieces have rows of their own."""
    return ops.is_call(node, "getitem") and ops.is_call(
        node.all_input_nodes[0], "chunk", "split", "split_with_sizes"
    )


def _also_read(node: fx.Node, other: fx.Node) -> Refuse:
    return Refuse(f"{label(node)} is also read by {label(other)}", node)


def _send_rows(way: list[fx.Node]) -> Tensor:
    """The row numbers of the producer, at the example sizes, as they arrive at the end of the way."""
    producer = way[0]
    shape, axis = producer.meta["val"].shape, CHANNEL_OF_ROW[ops.name(producer)]
    numbers = torch.arange(shape[axis], dtype=torch.float32)
    value: object = numbers.view([-1 if k == axis % len(shape) else 1 for k in range(len(shape))]).expand(
        shape
    )
    for before, node in pairwise(way):
        value = _carry(node, before, value)
    assert isinstance(value, Tensor)  # chunk is always followed by getitem
    return value


def _carry(node: fx.Node, before: fx.Node, value: object) -> object:
    name = ops.name(node)
    if name in AVERAGES:  # every output token is a mean of value tokens, channel by channel
        assert isinstance(value, Tensor)
        return value[..., :1, :].expand(node.meta["val"].shape)
    if name == "mul":
        assert isinstance(value, Tensor)
        return value.expand(node.meta["val"].shape)
    if not callable(node.target):
        raise TypeError(f"{label(node)} is not a call")
    return call_with(node.target, node.args, node.kwargs, lambda n: value if n is before else n.meta["val"])
