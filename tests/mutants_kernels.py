"""Bugs planted in lower-cpu and fuse: what native operators are handed, and how weights are laid out."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from unittest.mock import patch

import torch
from planting import Mutant, Plant, derived, edited, nothing, operands, patched, planted
from torch import Tensor, fx

from dmqfx.graph import ops
from dmqfx.graph.modules import clone
from dmqfx.graph.pipeline import Pass, PassContext
from dmqfx.graph.program import Program
from dmqfx.graph.registry import passes
from dmqfx.graph.rewrite import Rewriter
from dmqfx.runtime.costs import Cost, Costs
from dmqfx.runtime.kernels import weights


def laid_out(change: Callable[[Tensor], Tensor]) -> Plant:
    """lower-cpu with the codes of every weight changed before they are packed."""
    return patched(
        "pack",
        lambda honest: lambda codes, *given, **named: honest(change(codes), *given, **named),
        where=weights,
    )


def one_code_off(codes: Tensor) -> Tensor:
    last = codes.flatten().clone()
    last[-1] = -last[-1] if last[-1] else 1
    return last.reshape(codes.shape)


def transposed_taps(codes: Tensor) -> Tensor:
    return codes.mT.contiguous() if codes.dim() == 4 else codes


def last_scale(rw: Rewriter, node: fx.Node) -> fx.Node | None:
    if node.meta["address"].path != "up.0.conv2":
        return None
    return rw.like(node, w_scale=rw.value(ops.tensor(node, "w_scale"))[:, -1:])


def zero_point_of_the_next_group(rw: Rewriter, found: Mapping[str, fx.node.Argument]) -> fx.node.Argument:
    zero_point = found["x_zero_point"]
    return rw.constant("rolled", rw.value(zero_point).roll(1, 0)) if isinstance(zero_point, fx.Node) else None


def shift_of_the_next_group(rw: Rewriter, found: Mapping[str, fx.node.Argument]) -> fx.node.Argument:
    shift = found["shift"]
    return rw.constant("rolled_shift", rw.value(shift).roll(1, 0)) if isinstance(shift, fx.Node) else None


def without_padding(honest: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in honest if name != "padding")


class Slow(Costs):
    """As if every native layer were slower."""

    @staticmethod
    def here() -> Costs:
        return Slow()

    def of(self, layer: str, size: str) -> Cost | None:
        return Cost(2.0, 1.0)


def folded(change: Callable[[Tensor], Tensor]) -> Plant:
    """choose-forms where all layers are faster simulated, and then one of their weights changed."""

    def plant(step: str) -> Pass:
        honest = passes()[step]

        def run(self: Pass, program: Program, ctx: PassContext) -> Program:
            with patch.object(sys.modules[honest.__module__], "Costs", Slow):
                after = honest.run(self, program, ctx)
            weights = after.weights()
            name = next((name for name in weights if name.endswith("down.conv1.weight_simulated")), None)
            if name is None:
                return after
            return replace(after, gm=clone(after.gm, {**weights, name: change(weights[name].clone())}))

        return derived(run=run)(step)

    return plant


def next_code(weight: Tensor) -> Tensor:
    weight.view(-1)[0] += weight.abs().max() / 7
    return weight


MUTANTS: tuple[Mutant, ...] = (
    *planted(
        "choose-forms",
        {
            "a weight that is kept in float is one code off": (folded(next_code), "down.conv1/conv2d"),
            "a weight that is kept in float is of other channels": (
                folded(lambda weight: weight.flip(0)),
                "down.conv1/conv2d",
            ),
        },
        meets="lower-reference",
    ),
    *planted(
        "lower-cpu",
        {
            "one code is off": (laid_out(one_code_off), "time_embedding.linear_1/linear"),
            "the taps of a kernel are transposed": (laid_out(transposed_taps), "down.conv1/conv2d"),
            "the bias is lost": (operands(bias=nothing), "time_embedding.linear_1/linear"),
            "the padding is lost": (patched("CONV_ARGUMENTS", without_padding), "down.conv1/conv2d"),
            "the zero points are those of the next group": (
                operands(x_zero_point=zero_point_of_the_next_group),
                "time_embedding.linear_1/linear",
            ),
            "the last channel's scale counts for all": (
                edited("kernel_conv2d", last_scale),
                "up.0.conv2/conv2d",
            ),
        },
    ),
)
MUTANTS += tuple(
    planted(
        "lower-cpu",
        {
            "channels with finer steps are not shifted": (
                operands(shift=nothing),
                "up.0.conv_shortcut/conv2d",
            ),
            "the shifts are those of the next group": (
                operands(shift=shift_of_the_next_group),
                "up.0.conv_shortcut/conv2d",
            ),
        },
        policy="shifts",
    )
)


def without_silu(rw: Rewriter, node: fx.Node) -> fx.Node | None:
    return rw.like(node, activation="none") if node.meta["address"].path == "down.conv1" else None


def wider_groups(rw: Rewriter, node: fx.Node) -> fx.Node | None:
    return rw.like(node, norm_groups=1) if node.meta["address"].path == "down.conv2" else None


def halves_swapped(rw: Rewriter, node: fx.Node) -> fx.Node | None:
    named = ops.args(node)
    if named["activation"] != "geglu":
        return None
    bias = rw.value(ops.tensor(node, "bias"))
    return rw.like(node, bias=bias.roll(len(bias) // 2))


def norm_forgotten(rw: Rewriter, node: fx.Node) -> fx.Node | None:
    return rw.like(node, norm="none") if ops.args(node)["norm"] == "layer" else None


def weight_and_bias_changed(honest: dict[str, str]) -> dict[str, str]:
    return honest | {"norm_weight": "bias", "norm_bias": "weight"}


def at(where: str, **changed: fx.node.Argument) -> Callable[[Rewriter, fx.Node], fx.Node | None]:
    """Other arguments at one address."""
    return lambda rw, node: rw.like(node, **changed) if str(node.meta["address"]) == where else None


def arms_swapped(rw: Rewriter, node: fx.Node) -> fx.Node | None:
    named = ops.args(node)
    return rw.like(node, x=named["beside"], beside=named["x"]) if named["beside"] is not None else None


def one_pixel_aside(rw: Rewriter, node: fx.Node) -> fx.Node | None:
    if ops.args(node)["upsample_factors"] is None:
        return None
    rolled = rw.call(
        torch.ops.aten.roll.default, near=node, self=ops.args(node)["x_codes"], shifts=[1], dims=[-1]
    )
    return rw.like(node, x_codes=rolled)


MUTANTS += tuple(
    planted(
        "fuse",
        {
            "what is added to a convolution is lost": (
                edited("kernel_conv2d", at("down/add#1", added=None)),
                "down/add#1",
            ),
            "what is added to a linear layer is lost": (
                edited("kernel_linear", at("mid/add", added=None)),
                "mid/add",
            ),
            "the bias is lost where something is added": (
                edited("kernel_conv2d", at("up.0/add", bias=None)),
                "up.0/add",
            ),
            "the arms change places": (
                edited("kernel_quantize", arms_swapped),
                "up.0.conv1/quantize~insert-qdq.1",
            ),
            "codes of results are cut off": (
                edited("kernel_linear", at("mid.out/quantize~insert-qdq.1", out_qmax=100)),
                "mid.out/quantize~insert-qdq.1",
            ),
            "upsampled codes are one pixel aside": (
                edited("kernel_conv2d", one_pixel_aside),
                "upsample/conv2d",
            ),
            "silu is dropped": (edited("kernel_quantize", without_silu), "down.conv1/quantize~insert-qdq.1"),
            "all channels are one group": (
                edited("kernel_quantize", wider_groups),
                "down.conv2/quantize~insert-qdq.1",
            ),
            "the layer norm is dropped": (
                edited("kernel_quantize", norm_forgotten),
                "mid.to_q/quantize~insert-qdq.1",
            ),
            "the gate and what it gates change places": (
                edited("kernel_linear", halves_swapped),
                "mid.out/quantize~insert-qdq.1",
            ),
            "a norm's weight and bias change places": (
                patched("NORM_ARGUMENTS", weight_and_bias_changed),
                "down.conv1/quantize~insert-qdq.1",
            ),
        },
    )
)
