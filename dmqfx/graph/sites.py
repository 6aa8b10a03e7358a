"""Which operations of a program have sites that can be quantized, and what feeds them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from dmqfx.graph import ops
from dmqfx.graph.address import Site
from dmqfx.graph.program import Program
from dmqfx.graph.table import Codes, Planned, Range, SkipArm, SkipConcat
from dmqfx.policy.policy import KIND_OF_OPERATOR, OPERANDS, Operation

CHANNEL_AXIS = {
    "conv2d": 1,
    "linear": -1,
    "scaled_dot_product_attention": -1,
    "attention_softmax": -1,
    "attention_average": -1,
}
"""The axis that counts channels of what an operator reads, by operator; not that of a softmax."""
_HEADS = 1


def operations(program: Program) -> list[Operation]:
    """What a policy can decide about: convolutions, linear layers and attention products, in execution order."""
    return [
        Operation(
            node.meta["address"],
            KIND_OF_OPERATOR[ops.name(node)],
            fed_by_skip(program, Site(node.meta["address"], "input")),
        )
        for node in program.calls(*KIND_OF_OPERATOR)
    ]


def fed_by_skip(program: Program, site: Site) -> bool:
    """Whether what arrives at a site is a decoder's concatenation with a long skip, or one arm of it."""
    if program.table.get(site, SkipArm) is not None:
        return True
    source = ops.args(program.node(site.at)).get(site.arg)
    at = source.meta.get("address") if isinstance(source, fx.Node) else None
    return at is not None and program.table.get(Site(at, "tensors"), SkipConcat) is not None


def readers(node: fx.Node) -> Iterator[tuple[fx.Node, str]]:
    """The operations that read a node's value, with the schema name of the argument."""
    for user in node.users:
        if user.op == "call_function":
            for arg, value in ops.args(user).items():
                if value is node or (isinstance(value, (list, tuple)) and node in value):
                    yield user, arg


def channel_axis(program: Program, site: Site) -> int:
    """The axis of the tensor at an activation site that counts channels: 1 for feature maps, -1 for tokens.

    The last axis of a softmax counts keys, of which there are as many as the caller pleases: its channels are heads.
    """
    return channel_axis_of(program.node(site.at), site.arg)


def channel_axis_of(reader: fx.Node, arg: str) -> int:
    """As `channel_axis`, of what an operation that has sites reads as an argument."""
    return _HEADS if arg == "softmax" else CHANNEL_AXIS[ops.name(reader)]


def is_weight(site: Site) -> bool:
    """Whether a site is a weight, not an activation."""
    return site.arg == "weight"


def quantized(program: Program) -> Iterator[Site]:
    """Sites that are planned to be quantized."""
    return (site for site, plan in program.table.of(Planned).items() if plan.spec is not None)


def unplanned(program: Program) -> Iterator[Site]:
    """Sites that could be quantized, but of which the plan says nothing."""
    plan = program.table.of(Planned)
    for node in program.calls(*KIND_OF_OPERATOR):
        for arg in OPERANDS[ops.name(node)]:
            if (site := Site(node.meta["address"], arg)) not in plan:
                yield site


def without_codes(program: Program) -> Iterator[Site]:
    """Weights that are planned to be quantized and have no Codes."""
    return (s for s in quantized(program) if is_weight(s) and program.table.get(s, Codes) is None)


def without_range(program: Program) -> Iterator[Site]:
    """Activations that are planned to be quantized and have no Range."""
    return (s for s in quantized(program) if not is_weight(s) and program.table.get(s, Range) is None)
