"""lower-cpu: integer layers in plain torch to the native kernels, which give the same bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from dmqfx.graph import ops
from dmqfx.graph.facts import INTEGER, Fact
from dmqfx.graph.pattern import Outcome, RewritePass, Rule, p, rule
from dmqfx.graph.pipeline import Preserves
from dmqfx.graph.rewrite import Refuse, Rewriter
from dmqfx.passes.lower_simulate import fold_weight
from dmqfx.runtime import integer
from dmqfx.runtime.kernels import weights
from dmqfx.runtime.kernels.native import absent
from dmqfx.runtime.operators import OPS

CONTIGUOUS = torch.ops.aten.contiguous.default
CONV_ARGUMENTS = ("stride", "padding", "dilation", "groups")
HANDED_ON = (
    "x_codes", "x_scale", "x_zero_point", "group", "bits", "weight_shape", "w_scale", "bias", "shift",
)  # fmt: skip


@rule(p.qconv2d(packed_weight=p.attr("packed")))
def native_conv2d(rw: Rewriter, root: fx.Node, packed: fx.Node) -> Outcome:
    """qconv2d(x, w)  ->  kernel_conv2d(x, w in the kernels' form)."""
    named = ops.args(root)
    groups = named["groups"]
    shared = _operands(rw, root, packed, groups if isinstance(groups, int) else 1)
    if isinstance(shared, Refuse):
        return shared
    convolved = {arg: named[arg] for arg in CONV_ARGUMENTS}
    return rw.call_at(OPS.kernel_conv2d.default, root.meta["address"], **shared, **convolved)


@rule(p.qlinear(packed_weight=p.attr("packed")))
def native_linear(rw: Rewriter, root: fx.Node, packed: fx.Node) -> Outcome:
    """qlinear(x, w)  ->  kernel_linear(x, w in the kernels' form)."""
    shared = _operands(rw, root, packed, 1)
    return (
        shared
        if isinstance(shared, Refuse)
        else rw.call_at(OPS.kernel_linear.default, root.meta["address"], **shared)
    )


@rule(p.view(self=p.any("x")))
def reshape_images(rw: Rewriter, root: fx.Node, x: fx.Node) -> Outcome:
    """view(x)  ->  reshape(x) for x of four dimensions, which may be laid out channels last now."""
    if x.meta["val"].dim() != 4:
        return None
    return rw.call_at(
        torch.ops.aten.reshape.default, root.meta["address"], self=x, shape=ops.args(root)["size"]
    )


@rule(p.conv2d())
def lay_out_conv2d(rw: Rewriter, root: fx.Node) -> Outcome:
    """float conv2d(x)  ->  the same, laid out channels last as what native convolutions make."""
    readers = [reader for reader in root.users if reader.op != "output"]
    if not readers or root.meta["val"].dtype != torch.float32 or any(map(_lays_out, readers)):
        return None
    return rw.call(CONTIGUOUS, near=root, self=rw.like(root), memory_format=torch.channels_last)


@dataclass(frozen=True)
class LowerCpu(RewritePass):
    """integer layer in plain torch  ->  native kernel, the same bits; what it cannot take stays as it is.

    Native convolutions lay their results out channels last, and whatever reads those goes on so. Weights that are still dequantized belong to layers that compute in float: that is done once, not at every call.
    """

    requires: ClassVar[frozenset[Fact]] = frozenset({INTEGER})
    preserves: ClassVar[Preserves] = Preserves.BITWISE
    rules: ClassVar[tuple[Rule, ...]] = (
        native_conv2d,
        native_linear,
        reshape_images,
        lay_out_conv2d,
        fold_weight,
    )


def _lays_out(node: fx.Node) -> bool:
    return ops.is_call(node, "contiguous") and ops.args(node)["memory_format"] == torch.channels_last


def _operands(
    rw: Rewriter, root: fx.Node, packed: fx.Node, groups: int
) -> dict[str, fx.node.Argument] | Refuse:
    """The arguments that both native layers take."""
    named = ops.args(root)
    if why := absent():
        return Refuse(why, root)
    codes = OPS.unpack(rw.value(packed), named["bits"], named["signed"], named["weight_shape"])
    zero_point = rw.value(ops.tensor(root, "w_zero_point"))
    centered = integer.centered_weight(codes, zero_point) if bool(zero_point.any()) else codes
    least, greatest = map(int, torch.aminmax(centered)) if centered.numel() else (0, 0)
    if least < -128 or greatest > 127:
        return Refuse(
            f"weight codes less their zero points go from {least} to {greatest}, the kernels take 8 bits; "
            "make the weight's grid symmetric",
            root,
        )
    shift = rw.value(ops.tensor(root, "shift")) if named["shift"] is not None else None
    blob = weights.pack(centered.to(torch.int8), groups, shift)
    name = str(packed.target).removesuffix("_packed") + "_kernel"
    return {**{arg: named[arg] for arg in HANDED_ON}, "packed_weight": rw.constant(name, blob)}
