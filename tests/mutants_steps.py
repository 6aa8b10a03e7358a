"""Planted bugs in steps that are learned for the output."""

from __future__ import annotations

from dataclasses import replace

from planting import Mutant, planted, with_entry, without_entry

from dmqfx.graph.table import Bias, Codes
from dmqfx.numbers.quant import QParams

AT = "down.conv1/conv2d"


def another_code(entry: Codes) -> Codes:
    packed = entry.packed.clone()
    packed[0] = packed[0] ^ 1
    return replace(entry, packed=packed)


def four_times(entry: QParams) -> QParams:
    return replace(entry, scale=entry.scale * 4)


def four_times_of_codes(entry: Codes) -> Codes:
    return replace(entry, qparams=four_times(entry.qparams))


def one_higher(entry: QParams) -> QParams:
    up = entry.zero_point < entry.qmax
    return replace(entry, zero_point=entry.zero_point + up.to(entry.zero_point) * 2 - 1)


def one_short(entry: Bias) -> Bias:
    return Bias(entry.value[:-1].contiguous())


MUTANTS: tuple[Mutant, ...] = (
    *planted(
        "learn-steps",
        {
            "a code moves with its step": (with_entry(f"{AT}:weight", Codes, another_code), AT),
            "an input's step goes too far": (with_entry(f"{AT}:input", QParams, four_times), AT),
            "a weight's step goes too far": (with_entry(f"{AT}:weight", Codes, four_times_of_codes), AT),
            "a zero point moves with its step": (with_entry(f"{AT}:input", QParams, one_higher), AT),
            "a channel loses its bias": (with_entry(f"{AT}:bias", Bias, one_short), AT),
            "a layer loses its codes by steps": (without_entry(f"{AT}:weight", Codes), AT),
        },
        policy="shifts",
    ),
)
