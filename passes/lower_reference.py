"""lower-reference: quantized layers to exact integer arithmetic in plain torch, which runs everywhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from dmqfx.graph import ops
from dmqfx.graph.facts import INTEGER, QDQ, Fact
from dmqfx.graph.pattern import Outcome, RewritePass, Rule, p, rule
from dmqfx.graph.pipeline import Preserves
from dmqfx.graph.rewrite import Refuse, Rewriter
from dmqfx.runtime import integer
from dmqfx.runtime.operators import OPS

WEIGHT = p.dequantize(codes=p.unpack().as_("unpacked")).as_("weight")
CONV_ARGUMENTS = ("stride", "padding", "dilation", "groups")


@rule(p.conv2d(input=p.any("x"), weight=WEIGHT))
def integer_conv2d(rw: Rewriter, root: fx.Node, x: fx.Node, weight: fx.Node, unpacked: fx.Node) -> Outcome:
    """conv2d(dequantize(x), dequantize(w))  ->  qconv2d(x, w): integer products, one float epilogue."""
    named = ops.args(root)
    if isinstance(named["padding"], str):
        return Refuse(f"its padding is the word {named['padding']!r}, not a number for each side")
    shared = _operands(rw, x, weight, unpacked, root)
    if isinstance(shared, Refuse):
        return shared
    return rw.call_at(
        OPS.qconv2d.default, root.meta["address"], **shared, **{arg: named[arg] for arg in CONV_ARGUMENTS}
    )


@rule(p.linear(input=p.any("x"), weight=WEIGHT))
def integer_linear(rw: Rewriter, root: fx.Node, x: fx.Node, weight: fx.Node, unpacked: fx.Node) -> Outcome:
    """linear(dequantize(x), dequantize(w))  ->  qlinear(x, w): integer products, one float epilogue."""
    shared = _operands(rw, x, weight, unpacked, root)
    return (
        shared
        if isinstance(shared, Refuse)
        else rw.call_at(OPS.qlinear.default, root.meta["address"], **shared)
    )


@rule(p.one_of("scaled_dot_product_attention", "attention_softmax", "attention_average"))
def float_attention(rw: Rewriter, root: fx.Node) -> Outcome:
    """attention(dequantize(x), ...)  stays: on grids of the plan it computes in float."""
    quantized = [arg for arg, value in ops.args(root).items() if ops.is_call(value, "dequantize")]
    if not quantized:
        return None
    return Refuse(f"it computes in float on dequantized operands: {', '.join(quantized)}")


@dataclass(frozen=True)
class LowerReference(RewritePass):
    """dequantize -> layer  ->  integer layer on the codes, with weights packed in memory.

    Attention whose operands the plan quantizes computes in float: they are dequantized at every call.
    """

    requires: ClassVar[frozenset[Fact]] = frozenset({QDQ})
    provides: ClassVar[frozenset[Fact]] = frozenset({INTEGER})
    clears: ClassVar[frozenset[Fact]] = frozenset({QDQ})
    preserves: ClassVar[Preserves] = Preserves.EXACT
    rules: ClassVar[tuple[Rule, ...]] = (integer_conv2d, integer_linear, float_attention)


def _operands(
    rw: Rewriter, x: fx.Node, weight: fx.Node, unpacked: fx.Node, root: fx.Node
) -> dict[str, fx.node.Argument] | Refuse:
    """The arguments that both integer layers take."""
    if not ops.is_call(x, "dequantize"):
        return Refuse("the input is float: weight-only layers are dequantized at every call", x)
    activation, codes, real = ops.args(x), ops.args(unpacked), ops.args(weight)
    scale, shift = activation["scale"], activation["shift"]
    if isinstance(scale, fx.Node) and scale.meta["val"].shape[1] != 1:
        return Refuse(
            "the input has a scale per channel, which an integer product cannot take out of the sum", x
        )
    if (why := _overflow(rw, unpacked, weight, shift)) is not None:
        return Refuse(why, root)
    return {
        "x_codes": activation["codes"],
        "x_scale": scale,
        "x_zero_point": activation["zero_point"],
        "group": activation["group"],
        "packed_weight": codes["packed"],
        "bits": codes["bits"],
        "signed": codes["signed"],
        "weight_shape": codes["shape"],
        "w_scale": real["scale"],
        "w_zero_point": real["zero_point"],
        "bias": ops.args(root)["bias"],
        "shift": shift,
    }


def _overflow(rw: Rewriter, unpacked: fx.Node, weight: fx.Node, shift: fx.node.Argument) -> str | None:
    """Why the sums may overflow int32, or None; codes are looked at only where their number alone allows it."""
    exponent = rw.value(shift) if isinstance(shift, fx.Node) else None
    most = 0 if exponent is None else int(exponent.amax())
    if weight.meta["val"][0].numel() * 255 * 255 << most < 2**31:
        return None
    zero_point = rw.value(ops.tensor(weight, "zero_point"))
    return integer.overflow(integer.centered_weight(rw.value(unpacked), zero_point), exponent)
