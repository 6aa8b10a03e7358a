"""Planted bugs in what concerns the arms of skips, their ranges and their shifts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from planting import Function, Mutant, Plant, edited, patched, planted, spoiled, with_entry
from torch import Tensor, fx

from dmqfx.graph import ops
from dmqfx.graph.address import Address, Site
from dmqfx.graph.journal import Journal
from dmqfx.graph.program import Program
from dmqfx.graph.rewrite import Refuse, Rewriter
from dmqfx.graph.table import Range, Shift, SkipArm
from dmqfx.numbers.quant import QParams
from dmqfx.numbers.voting import Ballot
from dmqfx.sweep.turn import Turn

DEEP, SKIP = "up.0.conv_shortcut/conv2d", "up.0.conv_shortcut/conv2d~split-skips.1"
LATER = "up.1.conv_shortcut/conv2d"
FIRST = "time_embedding.linear_1/linear"


# --- split-skips


def bias_in_both_arms(rw: Rewriter, node: fx.Node) -> fx.Node | None:
    """conv(skip, W)  ->  conv(skip, W, b), and the deep arm has b already."""
    if str(node.meta["address"]) != SKIP:
        return None
    return rw.like(node, bias=rw.value(ops.tensor(rw.node(Address.parse(DEEP)), "bias")))


def bias_in_neither_arm(rw: Rewriter, node: fx.Node) -> fx.Node | None:
    return rw.like(node, bias=None) if str(node.meta["address"]) == DEEP else None


def columns(deep: slice, skip: slice) -> Plant:
    """The arms with other columns of the whole weight than their own."""

    def spoil(before: Program, after: Program) -> Program:
        whole = before.constant_at(Site(Address.parse(DEEP), "weight"))
        rw = Rewriter(after, "split-skips", Journal())
        for at, part in ((DEEP, deep), (SKIP, skip)):
            node = rw.node(Address.parse(at))
            with rw.before(node):
                rw.replace(
                    node, rw.like(node, weight=whole.roll(-part.start, 1)[:, : part.stop - part.start])
                )
        return rw.finish()

    return spoiled(spoil)


def arms_subtracted(rw: Rewriter, node: fx.Node) -> fx.Node | None:
    """deep + skip  ->  deep - skip."""
    named = ops.args(node)
    if node.meta["address"].path != "up.0.conv_shortcut":
        return None
    return rw.call_at(
        torch.ops.aten.sub.Tensor, node.meta["address"], self=named["self"], other=named["other"]
    )


# --- fit-ranges


def twice_as_wide(entry: QParams) -> QParams:
    return replace(entry, scale=entry.scale * 2)


def ends_short(entry: QParams) -> QParams:
    return replace(entry, scale=entry.scale * 0.9)


def seven_codes_off(entry: QParams) -> QParams:
    return replace(entry, zero_point=(entry.zero_point + 7).clamp(entry.qmin, entry.qmax))


def half_as_wide(entry: QParams) -> QParams:
    return replace(entry, scale=entry.scale / 2)


def halved(seen: Range) -> Range:
    return replace(seen, low=seen.low / 2, high=seen.high / 2)


def fitted(change: Function) -> Plant:
    """fit-ranges with every grid changed that it makes of a range."""
    return patched("params_from_range", lambda honest: lambda *given: change(honest(*given)))


# --- vote-shifts


def next_group(entry: Shift) -> Shift:
    return replace(entry, exponent=entry.exponent.roll(1, 0))


def next_channel(entry: Shift) -> Shift:
    return replace(entry, exponent=entry.exponent.roll(1, 1))


def rows_of_pixels(entry: Shift) -> Shift:
    return replace(entry, exponent=entry.exponent[:, :8].contiguous())


def along_the_height(honest: Function) -> Function:
    """Every channel gets the votes of a row of pixels."""

    def errors(x: Tensor, *given: object) -> Tensor:
        found = honest(x.transpose(1, 2), *given)
        assert isinstance(found, Tensor)
        return found[:, torch.arange(x.shape[1]) % found.shape[1]]

    return errors


def finest_without_agreement(honest: Function) -> Function:
    """The fallback of the paper's text: where rows do not agree, the finest step."""

    def elected(self: Ballot, agree: float) -> Tensor:
        share = self.votes.amax(2).double() / self.votes.sum(2)
        return torch.where(share >= agree, self.votes.argmax(2), 0).to(torch.uint8)

    return elected


def steps_of_the_first_row(honest: Function) -> Function:
    def errors(x: Tensor, scale: Tensor, zero_point: Tensor, *given: object) -> object:
        return honest(x, scale[:1].expand_as(scale), zero_point[:1].expand_as(zero_point), *given)

    return errors


# --- insert-qdq and the lowering passes


def forgotten(rw: Rewriter, node: fx.Node) -> fx.Node | None:
    return rw.like(node, shift=None) if ops.args(node)["shift"] is not None else None


def rolled(dim: int) -> Function:
    def edit(rw: Rewriter, node: fx.Node) -> fx.Node | None:
        shift = ops.args(node)["shift"]
        return rw.like(node, shift=rw.value(shift).roll(1, dim)) if isinstance(shift, fx.Node) else None

    return edit


def undivided(honest: Function) -> Function:
    return lambda params, shift: params.scale


def same_step_for_all(honest: Function) -> Function:
    """Codes are made with the step of the whole tensor, and read back with a channel's own."""
    return property(lambda self: torch.ones_like(self.exponent, dtype=torch.float32))


def integer(change: Function) -> Plant:
    """lower-reference with the shift of its layers changed."""

    def wrong(honest: Function) -> Function:
        def read(rw: Rewriter, *given: object) -> object:
            found = honest(rw, *given)
            if isinstance(found, Refuse) or not isinstance(found, Mapping) or found["shift"] is None:
                return found
            return {**found, "shift": change(rw, found["shift"])}

        return read

    return patched("_operands", wrong)


def no_shift(rw: Rewriter, shift: fx.Node) -> None:
    return None


def shift_of_the_next_group(rw: Rewriter, shift: fx.Node) -> fx.Node:
    return rw.constant("rolled", rw.value(shift).roll(1, 0))


MUTANTS: tuple[Mutant, ...] = (
    *planted(
        "split-skips",
        {
            "the bias is added by both arms": (edited("conv2d", bias_in_both_arms), DEEP),
            "the bias is added by neither arm": (edited("conv2d", bias_in_neither_arm), ""),
            "the weight is split one channel late": (columns(slice(1, 13), slice(13, 21)), ""),
            "the arms are swapped": (columns(slice(8, 20), slice(0, 8)), ""),
            "the skip is subtracted": (edited("add", arms_subtracted), DEEP),
            "the arms change roles": (
                with_entry(f"{SKIP}:input", SkipArm, lambda entry: replace(entry, arm="deep")),
                DEEP,
            ),
        },
        policy="shifts",
    ),
    *planted(
        "fit-ranges",
        {
            "steps are twice as wide as they need be": (
                with_entry(f"{SKIP}:input", QParams, twice_as_wide),
                SKIP,
            ),
            "the grid ends short of the range": (with_entry(f"{SKIP}:input", QParams, ends_short), SKIP),
        },
        policy="shifts",
    ),
    *planted(
        "fit-ranges",
        {
            "a searched grid lies beyond the range": (
                with_entry(f"{SKIP}:input", QParams, seven_codes_off),
                SKIP,
            ),
            "every searched grid is seven codes off": (fitted(seven_codes_off), FIRST),
            "every searched grid has half its step": (fitted(half_as_wide), FIRST),
            "every range is half of what arrives": (
                patched("range", lambda honest: lambda *given: halved(honest(*given)), where=Turn),
                FIRST,
            ),
            "one searched grid has half its step": (with_entry(f"{SKIP}:input", QParams, half_as_wide), SKIP),
        },
        policy="searched",
    ),
    *planted(
        "vote-shifts",
        {
            "the exponents are those of the next group": (
                with_entry(f"{LATER}:input", Shift, next_group),
                LATER,
            ),
            "the exponents are those of the next channel": (
                with_entry(f"{LATER}:input", Shift, next_channel),
                LATER,
            ),
            "the exponents are as many as the map is high": (
                with_entry(f"{LATER}:input", Shift, rows_of_pixels),
                LATER,
            ),
            "votes are counted along the height": (patched("step_errors", along_the_height), DEEP),
            "rows that do not agree get the finest step": (
                patched("elected", finest_without_agreement, where=Ballot),
                SKIP,
            ),
            "every row votes on the first row's steps": (
                patched("step_errors", steps_of_the_first_row),
                DEEP,
            ),
        },
        policy="shifts",
    ),
    *planted(
        "insert-qdq",
        {
            "the step that shifts start from is not divided": (patched("_finest", undivided), DEEP),
            "the shift is forgotten": (edited("dequantize", forgotten), DEEP),
            "the shift is that of the next group": (edited("dequantize", rolled(0)), DEEP),
            "the shift is that of the next channel": (edited("dequantize", rolled(1)), DEEP),
            "codes are made with one step for all channels": (
                patched("factor", same_step_for_all, where=Shift),
                DEEP,
            ),
        },
        policy="shifts",
    ),
    *planted(
        "lower-reference",
        {
            "the shift is not handed on": (integer(no_shift), DEEP),
            "the shift handed on is that of the next group": (integer(shift_of_the_next_group), DEEP),
        },
        policy="shifts",
    ),
)
