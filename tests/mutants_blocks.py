"""Planted bugs in what residual blocks learn together."""

from __future__ import annotations

from dataclasses import replace

from planting import Mutant, planted, with_entry, without_entry

from dmqfx.graph.table import Bias, Codes

AT = "down.conv1/conv2d"


def four_codes_away(entry: Codes) -> Codes:
    packed = entry.packed.clone()
    packed[0] = packed[0] ^ 0b0100  # the first code's third bit: four steps
    return replace(entry, packed=packed)


def one_short(entry: Bias) -> Bias:
    return Bias(entry.value[:-1].contiguous())


MUTANTS: tuple[Mutant, ...] = (
    *planted(
        "reconstruct-blocks",
        {
            "a code goes to another one than its neighbour": (
                with_entry(f"{AT}:weight", Codes, four_codes_away),
                AT,
            ),
            "a layer loses its codes": (without_entry(f"{AT}:weight", Codes), AT),
            "a channel has no bias": (with_entry(f"{AT}:bias", Bias, one_short), AT),
        },
        policy="shifts",
    ),
)
