"""Facts: what is known to hold of a program. Passes require, provide and clear them; each can be checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dmqfx.graph.program import Program

__all__ = [
    "ATTENDED",
    "CALIBRATED",
    "CANONICAL",
    "CORRECTED",
    "FITTED",
    "FLAGGED",
    "HOISTED",
    "INTEGER",
    "LEARNED",
    "MEASURED",
    "OBSERVED",
    "PAIRED",
    "PLANNED",
    "QDQ",
    "ROUNDED",
    "SCALED",
    "SHIFTED",
    "STEPPED",
    "Fact",
]


def _always(program: Program) -> str | None:
    return None


@dataclass(frozen=True)
class Fact:
    """A named property of a program; `broken` returns what contradicts it, or None while it holds.

    What waits to be done has a pass `ended_by`, which does it.

    Example:
        >>> str(CANONICAL), CANONICAL == Fact("canonical", "other words")
        ('canonical', True)
    """

    name: str
    meaning: str = field(compare=False)
    broken: Callable[[Program], str | None] = field(default=_always, compare=False, repr=False)
    ended_by: str = field(default="", compare=False, repr=False)

    def __str__(self) -> str:
        return self.name


def _not_canonical(program: Program) -> str | None:
    noise = next(program.calls("dropout", "_assert_tensor_metadata", "_assert_scalar"), None)
    return f"{noise.meta['address']} is still there" if noise is not None else None


def _no_observer(program: Program) -> str | None:
    from dmqfx.graph.sites import is_weight, quantized

    asked = any(not is_weight(site) for site in quantized(program))
    there = any(n.op == "call_module" for n in program.graph.nodes)
    return "activations are planned, but the graph has no observer" if asked and not there else None


def _no_dequantize(program: Program) -> str | None:
    from dmqfx.graph.sites import quantized

    asked, there = any(quantized(program)), any(program.calls("dequantize"))
    return "sites are planned, but the graph has no dequantize" if asked and not there else None


def _no_plan(program: Program) -> str | None:
    from dmqfx.graph.sites import unplanned

    return next((f"{site} is not in the plan" for site in unplanned(program)), None)


def _no_range(program: Program) -> str | None:
    from dmqfx.graph.sites import without_range

    return next((f"{site} is planned, but has no Range" for site in without_range(program)), None)


def _no_codes(program: Program) -> str | None:
    from dmqfx.graph.sites import without_codes

    return next((f"{site} is planned, but has no Codes" for site in without_codes(program)), None)


def _misplaced(program: Program) -> str | None:
    from dmqfx.graph.hoisting import misplaced

    return next((f"{node.meta['address']} {why}" for node, why in misplaced(program.graph)), None)


CANONICAL = Fact("canonical", "no evaluation-time no-op, schema-ordered arguments", _not_canonical)
FLAGGED = Fact("flagged", "decoder concatenations of long skips are in the table")
PLANNED = Fact("planned", "every quantizable site has its spec, or float, from the policy", _no_plan)
OBSERVED = Fact("observed", "identity observers stand at the planned activation sites", _no_observer)
CALIBRATED = Fact("calibrated", "planned activation sites have their ranges in the table", _no_range)
FITTED = Fact("fitted", "planned activation sites have their scale and zero point in the table")
PAIRED = Fact("paired", "layers that share an input share one equivalent scale")
LEARNED = Fact("learned", "pairs have their equivalent scale in the table", ended_by="apply-scaling")
MEASURED = Fact(
    "measured", "layers have in the table what the output feels of theirs, as large as they are now"
)
SCALED = Fact("scaled", "x / gamma stands before scaled layers and gamma in their weights")
SHIFTED = Fact("shifted", "channels that want finer steps have their shifts in the table")
ROUNDED = Fact("rounded", "planned weights have their integer codes in the table", _no_codes)
CORRECTED = Fact("corrected", "biases make up for what quantization takes from the mean of outputs")
STEPPED = Fact("stepped", "steps and biases were learned for the UNet's output")
QDQ = Fact("qdq", "planned sites are quantized and dequantized in the graph", _no_dequantize)
ATTENDED = Fact("attended", "products of attention are of codes that are made at run time")
INTEGER = Fact("integer", "the graph was lowered for a target")
HOISTED = Fact(
    "hoisted", "what the sample does not change is computed once for what it depends on", _misplaced
)
