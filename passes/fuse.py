"""fuse: norm, activation and quantize before an integer layer to one native operator that writes codes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor, fx
from torch.fx.node import Argument

from dmqfx.graph import ops
from dmqfx.graph.facts import INTEGER, Fact
from dmqfx.graph.modules import is_fixed, label
from dmqfx.graph.pattern import Outcome, RewritePass, Rule, p, rule
from dmqfx.graph.pipeline import PassContext, Preserves
from dmqfx.graph.program import Program
from dmqfx.graph.rewrite import Refuse, Rewriter
from dmqfx.runtime.kernels.native import absent
from dmqfx.runtime.operators import OPS

CHANNELS = {"kernel_conv2d": 1, "kernel_linear": -1}
CONTIGUOUS = torch.ops.aten.contiguous.default
NORM_ARGUMENTS = {"norm_weight": "weight", "norm_bias": "bias", "eps": "eps"}
GROUP_NORM = p.group_norm(input=p.any("x")).as_("norm")
MODULATED = p.add(
    self=p.mul(self=GROUP_NORM, other=p.any("norm_scale")), other=p.any("norm_shift"), alpha=p.value(1)
)
LAYER_NORM = p.layer_norm(input=p.any("x")).as_("norm")
HALVES = p.chunk(self=p.any("x"), chunks=p.value(2)).as_("halves")
GELU = p.value("none")  # the exact one
MOST_FUSED = 16  # operations that one application leaves unread


@rule(p.quantize(x=p.silu(self=GROUP_NORM)))
def group_norm_silu_quantize(rw: Rewriter, root: fx.Node, x: fx.Node, norm: fx.Node) -> Outcome:
    """quantize(silu(group_norm(x)))  ->  kernel_quantize(x, group norm, silu)."""
    return _fused(rw, root, x, norm, "silu")


@rule(p.quantize(x=p.silu(self=MODULATED)))
def scale_shift_silu_quantize(
    rw: Rewriter, root: fx.Node, x: fx.Node, norm: fx.Node, norm_scale: Argument, norm_shift: Argument
) -> Outcome:
    """quantize(silu(group_norm(x) * scale + shift))  ->  kernel_quantize(x, group norm, scale, shift, silu)."""
    made, modulation = norm.meta["val"], {"norm_scale": norm_scale, "norm_shift": norm_shift}
    for each in modulation.values():
        val = each.meta["val"] if isinstance(each, fx.Node) and not is_fixed(each) else None
        if not isinstance(val, Tensor) or (val.shape, val.dtype) != ((*made.shape[:2], 1, 1), made.dtype):
            return Refuse("it is not scaled and shifted by one number for each channel of each image", norm)
    return _fused(rw, root, x, norm, "silu", modulation)


@rule(p.quantize(x=GROUP_NORM))
def group_norm_quantize(rw: Rewriter, root: fx.Node, x: fx.Node, norm: fx.Node) -> Outcome:
    """quantize(group_norm(x))  ->  kernel_quantize(x, group norm)."""
    return _fused(rw, root, x, norm)


@rule(p.quantize(x=LAYER_NORM))
def layer_norm_quantize(rw: Rewriter, root: fx.Node, x: fx.Node, norm: fx.Node) -> Outcome:
    """quantize(layer_norm(x))  ->  kernel_quantize(x, layer norm), over the last axis."""
    return _fused(rw, root, x, norm)


@rule(p.quantize(x=p.silu(self=p.any("x"))))
def silu_quantize(rw: Rewriter, root: fx.Node, x: fx.Node) -> Outcome:
    """quantize(silu(x))  ->  kernel_quantize(x, silu)."""
    return _fused(rw, root, x, None, "silu")


@rule(p.quantize(x=p.gelu(self=p.any("x"), approximate=GELU)))
def gelu_quantize(rw: Rewriter, root: fx.Node, x: fx.Node) -> Outcome:
    """quantize(gelu(x))  ->  kernel_quantize(x, gelu)."""
    return _fused(rw, root, x, None, "gelu")


@rule(
    p.quantize(
        x=p.mul(
            self=p.getitem(self=HALVES, index=p.value(0)),
            other=p.gelu(self=p.getitem(self=HALVES, index=p.value(1)), approximate=GELU),
        )
    )
)
def geglu_quantize(rw: Rewriter, root: fx.Node, x: fx.Node, halves: fx.Node) -> Outcome:
    """quantize(linear * gelu(gate)), halves of the last axis of x  ->  kernel_quantize(x, geglu)."""
    dims, axis = x.meta["val"].dim(), ops.args(halves)["dim"]
    if not isinstance(axis, int) or axis % dims != dims - 1 or _axis(root, x) != dims - 1:
        return Refuse("its halves are not those of the last axis", halves)
    if x.meta["val"].shape[-1] % 2:
        return Refuse("its halves are not of one size", halves)
    return _fused(rw, root, x, None, "geglu")


@rule(p.quantize(x=p.any("x")))
def native_quantize(rw: Rewriter, root: fx.Node, x: fx.Node) -> Outcome:
    """quantize(x)  ->  kernel_quantize(x), the same codes."""
    return _fused(rw, root, x)


LAYERS = p.one_of("kernel_conv2d", "kernel_linear", added=p.value(None)).as_("layer")
UPSAMPLED = p.upsample_nearest2d(input=p.any("small")).as_("upsampled")


@rule(p.kernel_quantize(x=p.any("copy")))
def any_layout(rw: Rewriter, root: fx.Node, copy: fx.Node) -> Outcome:
    """kernel_quantize(contiguous(x))  ->  kernel_quantize(x), which takes what layout there is."""
    if not ops.is_call(copy, "contiguous") or ops.args(copy)["memory_format"] == torch.channels_last:
        return None
    return rw.like(root, x=ops.args(copy)["self"])


@rule(p.kernel_quantize(x=p.any("x"), beside=p.value(None)))
def two_arms(rw: Rewriter, root: fx.Node, x: fx.Node) -> Outcome:
    """kernel_quantize(cat([a, b], 1))  ->  kernel_quantize(a, beside=b): no float concatenation is made."""
    if not ops.is_call(x, "cat") or x.meta["val"].dim() != 4 or ops.args(root)["axis"] != 1:
        return None
    named = ops.args(x)
    arms, dim = named["tensors"], named["dim"]
    if dim not in (1, -3) or not isinstance(arms, (list, tuple)) or len(arms) != 2:
        return Refuse("it is no concatenation of two arms along channels", x)
    first, second = arms
    if not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
        return Refuse("its arms are not both tensors", x)
    if first.meta["val"].dtype != second.meta["val"].dtype:
        return Refuse(f"its arms are {first.meta['val'].dtype} and {second.meta['val'].dtype}", x)
    return rw.like(root, x=first, beside=second)


@rule(
    p.kernel_conv2d(
        x_codes=p.kernel_quantize(x=UPSAMPLED, norm=p.value("none"), beside=p.value(None)).as_("codes"),
        upsample_size=p.value(None),
        upsample_factors=p.value(None),
    )
)
def upsampled_conv2d(
    rw: Rewriter, root: fx.Node, codes: fx.Node, upsampled: fx.Node, small: fx.Node
) -> Outcome:
    """conv2d(quantize(upsample(x)))  ->  conv2d(quantize(x), upsampled): nearest neighbours have the same codes."""
    named = ops.args(upsampled)
    size, factors = named["output_size"], named["scale_factors"]
    if isinstance(factors, (list, tuple)) and any(str(each).partition(".")[2] != "0" for each in factors):
        return Refuse(f"it upsamples by {list(factors)}, not by whole numbers", upsampled)
    fewer = rw.call(OPS.kernel_quantize.default, near=codes, **{**ops.args(codes), "x": small})
    return rw.like(root, x_codes=fewer, upsample_size=size, upsample_factors=factors)


@rule(p.add(self=LAYERS, other=p.any("other"), alpha=p.value(1)))
def layer_add(rw: Rewriter, root: fx.Node, layer: fx.Node, other: Argument) -> Outcome:
    """layer(x) + y  ->  layer(x, added=y), the same bits."""
    return _added(rw, root, layer, other)


@rule(p.add(self=p.any("other"), other=LAYERS, alpha=p.value(1)))
def add_layer(rw: Rewriter, root: fx.Node, layer: fx.Node, other: Argument) -> Outcome:
    """y + layer(x)  ->  layer(x, added=y), the same bits."""
    return _added(rw, root, layer, other)


@rule(p.kernel_quantize(x=p.any("layer"), norm=p.value("none"), beside=p.value(None)))
def layer_quantize(rw: Rewriter, root: fx.Node, layer: fx.Node) -> Outcome:
    """quantize(activation(layer(x)))  ->  layer(x) whose results become codes where they are made."""
    if not ops.is_call(layer, *CHANNELS) or any(
        reader is not root and _is_read(reader) for reader in layer.users
    ):
        return None
    named = ops.args(root)
    if named["axis"] != CHANNELS[ops.name(layer)] % layer.meta["val"].dim():
        return Refuse("its channels are not those of the layer", root)
    if ops.args(layer)["group"] is not named["group"]:
        return Refuse("it is of other timestep groups than the layer", root)
    grid: dict[str, Argument] = {f"out_{arg}": named[arg] for arg in ("scale", "zero_point", "qmin", "qmax")}
    return rw.call_at(
        layer.target,  # type: ignore[arg-type]  # an operator, as `is_call` says
        root.meta["address"],
        **{**ops.args(layer), **grid, "activation": named["activation"]},
    )


@rule(p.kernel_conv2d(channels_last=p.value(False)))
def conv2d_channels_last(rw: Rewriter, root: fx.Node) -> Outcome:
    """kernel_conv2d(x)  ->  the same, laid out as the kernel makes it and as the next layer reads it."""
    return rw.like(root, channels_last=True)


@rule(p.view(self=p.any("x")))
def reshape_views(rw: Rewriter, root: fx.Node, x: fx.Node) -> Outcome:
    """view(x)  ->  reshape(x), the same numbers of x that may be laid out channels last now."""
    return rw.call_at(
        torch.ops.aten.reshape.default, root.meta["address"], self=x, shape=ops.args(root)["size"]
    )


@rule(p.conv2d())
def lay_out_conv2d(rw: Rewriter, root: fx.Node) -> Outcome:
    """float conv2d(x)  ->  the same of x laid out channels last, and so laid out for all native operators that read it."""
    if not any(ops.is_call(reader, "kernel_quantize", *CHANNELS) for reader in root.users):
        return None
    last = torch.channels_last
    x = rw.call(CONTIGUOUS, near=root, self=ops.args(root)["input"], memory_format=last)
    return rw.call(CONTIGUOUS, near=root, self=rw.like(root, input=x), memory_format=last)


@dataclass(frozen=True)
class Fuse(RewritePass):
    """norm -> scale, shift -> activation -> quantize  ->  one native operator, whose codes lie as integer layers read them.

    It reads the arms of a concatenation where they are. Integer layers take what is added to their results, and
    convolutions the upsampling in front of them. What convolutions make stays laid out channels last.

    Codes are equal but for ties: the norm's sums and the exponential are rounded elsewhere than in torch. Where a
    norm or an activation has other readers only what follows it is fused.
    """

    requires: ClassVar[frozenset[Fact]] = frozenset({INTEGER})
    preserves: ClassVar[Preserves] = Preserves.EXACT
    rules: ClassVar[tuple[Rule, ...]] = (
        group_norm_silu_quantize,
        scale_shift_silu_quantize,
        group_norm_quantize,
        layer_norm_quantize,
        silu_quantize,
        gelu_quantize,
        geglu_quantize,
        native_quantize,
        any_layout,
        two_arms,
        upsampled_conv2d,
        layer_add,
        add_layer,
        layer_quantize,
        conv2d_channels_last,
        reshape_views,
        lay_out_conv2d,
    )

    def run(self, program: Program, ctx: PassContext) -> Program:
        """Fuse; what is known of concatenations and layers that became part of another operation is dropped."""
        fused = super().run(program, ctx)
        there = {node.meta["address"] for node in fused.graph.nodes if "address" in node.meta}
        return fused.with_table(fused.table.restricted(there))


def _fused(
    rw: Rewriter,
    root: fx.Node,
    x: fx.Node,
    norm: fx.Node | None = None,
    activation: str = "none",
    modulation: Mapping[str, Argument] = MappingProxyType({}),
) -> fx.Node | Refuse:
    """One operator in place of all."""
    axis = _axis(root, x)
    if isinstance(axis, Refuse):
        return axis
    chain: dict[str, Argument | Tensor] = {"x": x, "axis": axis, "activation": activation}
    if norm is not None:
        of_norm = ops.args(norm)
        kind, over = ops.name(norm).removesuffix("_norm"), of_norm.get("normalized_shape", [0])
        if (
            (axis == x.meta["val"].dim() - 1) != (kind == "layer")
            or not isinstance(over, list)
            or len(over) != 1
        ):
            return Refuse(f"{ops.name(norm)} is not over the axis that the codes' channels are on", norm)
        chain |= {arg: of_norm[theirs] for arg, theirs in NORM_ARGUMENTS.items()}
        chain |= {"norm": kind, "norm_groups": of_norm.get("num_groups", 1), **modulation}
    return rw.call_at(OPS.kernel_quantize.default, root.meta["address"], **{**ops.args(root), **chain})


def _is_read(node: fx.Node) -> bool:
    """Whether something comes of it: what was fused away stands in the graph until the pass ends, a few operations."""
    seen, waiting = {node}, [node]
    while waiting and len(seen) <= MOST_FUSED:
        reader = waiting.pop()
        if reader.op == "output":
            return True
        waiting += [user for user in reader.users if user not in seen]
        seen.update(reader.users)
    return len(seen) > MOST_FUSED


def _added(rw: Rewriter, root: fx.Node, layer: fx.Node, other: Argument) -> Outcome:
    """The layer with something added to its results."""
    if not isinstance(other, fx.Node) or not isinstance(other.meta.get("val"), Tensor):
        return Refuse("what is added is no tensor", root)
    if other is layer:
        return Refuse("it is added to itself", root)
    mine, theirs = root.meta["val"], other.meta["val"]
    if mine.shape != layer.meta["val"].shape or {mine.dtype, theirs.dtype} != {layer.meta["val"].dtype}:
        return Refuse(f"what is added, {theirs.dtype} {list(theirs.shape)}, makes the result another", other)
    return rw.call_at(
        layer.target,  # type: ignore[arg-type]  # an operator, as the pattern has it
        root.meta["address"],
        **{**ops.args(layer), "added": other},
    )


def _axis(root: fx.Node, x: fx.Node) -> int | Refuse:
    """Where the layers that read the codes have their channels: 1 of four dimensions, or the last."""
    if why := absent():
        return Refuse(why, root)
    others = sorted(label(reader) for reader in root.users if not ops.is_call(reader, *CHANNELS))
    if others:
        return Refuse(f"its codes are read by {', '.join(others[:3])}, not by native layers alone", root)
    dims, named = x.meta["val"].dim(), ops.args(root)
    axes: set[int] = {CHANNELS[ops.name(reader)] % dims for reader in root.users}
    per_channel = any(ops.tensor(root, grid).meta["val"].shape[1] > 1 for grid in ("scale", "zero_point"))
    if per_channel:
        axes.add(int(str(named["axis"])) % dims)
    if len(axes) != 1:
        return Refuse(f"its channels are on axes {sorted(axes)} at once", root)
    return axes.pop()
