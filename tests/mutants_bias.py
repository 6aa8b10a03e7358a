"""Planted bugs in what makes up for the mean error of layers."""

from __future__ import annotations

import torch
from planting import Function, Mutant, patched, planted, with_entry, without_entry
from torch import Tensor

from dmqfx.graph.table import Bias

FIRST, AT = "time_embedding.linear_1/linear", "up.0.conv1/conv2d"


def negated(honest: Function) -> Function:
    return lambda turn, reader: -honest(turn, reader)  # type: ignore[operator]  # it is a tensor


def of_the_next_channel(honest: Function) -> Function:
    return lambda turn, reader: honest(turn, reader).roll(1)  # type: ignore[attr-defined]  # it is a tensor


def of_the_first_row(honest: Function) -> Function:
    return lambda rows, timestep: honest(rows[:1], timestep[:1])  # type: ignore[index]  # both are tensors


def without_the_layers_own(honest: Function) -> Function:
    return lambda turn, reader, site, like: torch.zeros_like(like)


def one_short(entry: Bias) -> Bias:
    return Bias(entry.value[:-1].contiguous())


def not_a_number(entry: Bias) -> Bias:
    value: Tensor = entry.value.clone()
    value[0] = torch.nan
    return Bias(value)


MUTANTS: tuple[Mutant, ...] = (
    *planted(
        "correct-bias",
        {
            "the correction has the wrong sign": (patched("lacking", negated), FIRST),
            "each channel gets the correction of the next": (patched("lacking", of_the_next_channel), FIRST),
            "the first row counts for all": (patched("_uniform", of_the_first_row), FIRST),
            "the layer's own bias is lost": (patched("_current", without_the_layers_own), FIRST),
            "a layer is left out": (without_entry(f"{AT}:bias", Bias), AT),
            "a channel has no bias": (with_entry(f"{AT}:bias", Bias, one_short), AT),
            "a bias is not a number": (with_entry(f"{AT}:bias", Bias, not_a_number), AT),
        },
        policy="shifts",
    ),
)
