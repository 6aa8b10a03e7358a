"""lower-cpu: integer layers in plain torch to the native kernels, which give the same bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from dmqfx.graph import ops
from dmqfx.graph.facts import INTEGER, Fact
from dmqfx.graph.modules import is_fixed
from dmqfx.graph.pattern import Outcome, RewritePass, Rule, p, rule
from dmqfx.graph.pipeline import Preserves
from dmqfx.graph.rewrite import Refuse, Rewriter
from dmqfx.passes.lower_simulate import fold_weight
from dmqfx.runtime import integer
from dmqfx.runtime.kernels import weights
from dmqfx.runtime.kernels.attend import WIDEST
from dmqfx.runtime.kernels.native import absent
from dmqfx.runtime.operators import OPS

CONV_ARGUMENTS = ("stride", "padding", "dilation", "groups")
HANDED_ON = (
    "x_codes", "x_scale", "x_zero_point", "group", "bits", "weight_shape", "w_scale", "bias", "shift",
)  # fmt: skip


@rule(p.qconv2d(packed_weight=p.attr("packed")))
def native_conv2d(rw: Rewriter, root: fx.Node, packed: fx.Node) -> Outcome:
    """qconv2d(x, w)  ->  kernel_conv2d(x, w in the kernels' form)."""
    named = ops.args(root)
    groups = named["groups"]
    strided = named["stride"] != [1, 1]
    shared = _operands(rw, root, packed, groups if isinstance(groups, int) else 1, strided=strided)
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


@rule(p.qattention())
def native_attention(rw: Rewriter, root: fx.Node) -> Outcome:
    """qattention(q, k, v)  ->  kernel_attention(q, k, v)."""
    if why := absent():
        return Refuse(why, root)
    query = ops.tensor(root, "query").meta["val"]
    if query.dtype != torch.float32 or query.shape[-1] > WIDEST:
        words = str(query.dtype).removeprefix("torch.")
        return Refuse(
            f"the kernel takes float32 and heads of up to {WIDEST} channels, not {words} of {query.shape[-1]}"
        )
    return rw.call_at(OPS.kernel_attention.default, root.meta["address"], **ops.args(root))


@dataclass(frozen=True)
class LowerCpu(RewritePass):
    """integer layer in plain torch  ->  native kernel, the same bits; what it cannot take stays as it is.

    Weights that are still dequantized belong to layers that compute in float: that is done once, not at every call.
    """

    requires: ClassVar[frozenset[Fact]] = frozenset({INTEGER})
    preserves: ClassVar[Preserves] = Preserves.BITWISE
    rules: ClassVar[tuple[Rule, ...]] = (
        native_conv2d,
        native_linear,
        native_attention,
        fold_weight,
    )


def _beyond(rw: Rewriter, root: fx.Node) -> str:
    """Why a kernel cannot take the input's zero points, which it multiplies as it does codes, or "" where they are codes.

    Those that depend on an input are looked at in every call.
    """
    zero_point = ops.tensor(root, "x_zero_point")
    if not is_fixed(zero_point) or not zero_point.meta["val"].numel():
        return ""
    codes, value = torch.iinfo(ops.tensor(root, "x_codes").meta["val"].dtype), rw.value(zero_point)
    least, greatest = map(float, torch.aminmax(value))
    if codes.min <= least and greatest <= codes.max and torch.equal(value, value.round()):
        return ""
    taken = f"whole ones from {codes.min} to {codes.max}"
    return f"zero points of the input go from {least:g} to {greatest:g}, kernels take {taken}"


def _operands(
    rw: Rewriter, root: fx.Node, packed: fx.Node, groups: int, *, strided: bool = False
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
    if why := _beyond(rw, root):
        return Refuse(why, root)
    shift = rw.value(ops.tensor(root, "shift")) if named["shift"] is not None else None
    blob = weights.pack(centered.to(torch.int8), groups, shift, strided=strided)
    name = str(packed.target).removesuffix("_packed") + "_kernel"
    return {**{arg: named[arg] for arg in HANDED_ON}, "packed_weight": rw.constant(name, blob)}
