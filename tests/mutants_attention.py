"""Planted bugs in attention: where it is split or quantized, and where a kernel computes it in float."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from planting import Function, Mutant, Plant, edited, patched, planted, with_constant, with_entry
from torch import Tensor, fx

from dmqfx.graph import ops
from dmqfx.graph.address import Site
from dmqfx.graph.program import Program
from dmqfx.graph.rewrite import Rewriter
from dmqfx.numbers.quant import QParams
from dmqfx.runtime.operators import OPS

WHOLE, AVERAGE = "mid/scaled_dot_product_attention", "mid/attention_average~split-attention.1"


def without_scale(rw: Rewriter, node: fx.Node) -> fx.Node:
    return rw.like(node, scale=1.0)


def keys_for_queries(rw: Rewriter, node: fx.Node) -> fx.Node:
    named = ops.args(node)
    return rw.like(node, query=named["key"], key=named["query"])


def over_the_queries(rw: Rewriter, node: fx.Node) -> fx.Node:
    """average(softmax(q @ k^T), v)  ->  average(softmax(k @ q^T)^T, v): each key's weights add up to 1."""
    named = ops.args(ops.tensor(node, "softmax"))
    turned = rw.call(OPS.attention_softmax.default, near=node, query=named["key"], key=named["query"])
    back = rw.call(torch.ops.aten.transpose.int, near=node, self=turned, dim0=-2, dim1=-1)
    return rw.like(node, softmax=back)


def keys_for_values(rw: Rewriter, node: fx.Node) -> fx.Node:
    return rw.like(node, value=ops.tensor(ops.tensor(node, "softmax"), "key"))


def coded(edit: Callable[[Rewriter, fx.Node], fx.Node]) -> Plant:
    """quantize-attention of however few keys, and then its operators replaced."""
    return lambda step: replace(edited("qattention", edit)(step), keys=1)  # type: ignore[type-var]  # passes are dataclasses


def with_two_bits(rw: Rewriter, node: fx.Node) -> fx.Node:
    return rw.like(node, bits=2)


def keys_added(rw: Rewriter, node: fx.Node) -> fx.Node:
    named = ops.args(node)
    both = rw.call(torch.ops.aten.add.Tensor, near=node, self=named["value"], other=named["key"])
    return rw.like(node, value=both)


def with_a_bit_less(rw: Rewriter, node: fx.Node) -> fx.Node:
    return rw.like(node, bits=7)


def by_the_other_order(rw: Rewriter, node: fx.Node) -> fx.Node:
    """Tokens and heads change places in what is read on."""
    return rw.call(torch.ops.aten.flip.default, near=node, self=rw.like(node), dims=[1])


def keys_for_heads(honest: Function) -> Function:
    """The last axis of a softmax for its channels."""

    def axis(program: Program, site: Site) -> object:
        return -1 if site.arg == "softmax" else honest(program, site)

    return axis


def of_the_other_head(scale: Tensor) -> Tensor:
    return scale.flip(-1)


def around_zero(entry: QParams) -> QParams:
    """The codes of probabilities, none of which is negative, from the middle on."""
    middle = torch.full_like(entry.zero_point, 128)
    return QParams(entry.scale * 2, middle, entry.qmin, entry.qmax, entry.axis, entry.boundaries)


MUTANTS: tuple[Mutant, ...] = (
    *planted(
        "split-attention",
        {
            "the scale is forgotten": (edited("attention_softmax", without_scale), WHOLE),
            "queries and keys change roles": (edited("attention_softmax", keys_for_queries), WHOLE),
            "the softmax is over the queries": (edited("attention_average", over_the_queries), WHOLE),
            "keys are averaged": (edited("attention_average", keys_for_values), WHOLE),
        },
        policy="softmax",
    ),
    *planted(
        "quantize-attention",
        {
            "the scale of scores is forgotten": (coded(without_scale), WHOLE),
            "codes of queries and keys change roles": (coded(keys_for_queries), WHOLE),
            "keys are averaged with values": (coded(keys_added), WHOLE),
            "codes have two bits": (coded(with_two_bits), WHOLE),
            "heads change places": (coded(by_the_other_order), WHOLE),
        },
        policy="attended",
    ),
    *planted(
        "lower-cpu",
        {
            "queries lose a bit": (edited("kernel_attention", with_a_bit_less), WHOLE),
            "the kernel is told no scale": (edited("kernel_attention", without_scale), WHOLE),
        },
        policy="attended",
    ),
    *planted(
        "fuse",
        {"a fused program attends with less bits": (edited("kernel_attention", with_a_bit_less), "")},
        policy="attended",
    ),
    *planted(
        "lower-float",
        {
            "a kernel in float is told no scale": (edited("kernel_sdpa", without_scale), WHOLE),
            "its queries and keys change roles": (edited("kernel_sdpa", keys_for_queries), WHOLE),
            "it averages keys with values": (edited("kernel_sdpa", keys_added), WHOLE),
            "its heads change places": (edited("kernel_sdpa", by_the_other_order), WHOLE),
        },
    ),
    *planted(
        "insert-observers",
        {"the keys of a softmax are its channels": (patched("channel_axis", keys_for_heads), AVERAGE)},
        policy="softmax",
    ),
    *planted(
        "fit-ranges",
        {"a softmax is centred": (with_entry(f"{AVERAGE}:softmax", QParams, around_zero), AVERAGE)},
        policy="softmax",
    ),
    *planted(
        "insert-qdq",
        {"each head has the other's step": (with_constant("mid.softmax_scale", of_the_other_head), AVERAGE)},
        policy="softmax",
    ),
)
