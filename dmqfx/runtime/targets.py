"""Targets: what the layers of a finished program run as. A target is a list of lowering passes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from dmqfx.errors import PassNotFoundError
from dmqfx.graph import registry
from dmqfx.graph.pipeline import PassContext
from dmqfx.graph.program import Program
from dmqfx.runtime.kernels.native import library
from dmqfx.words import suggest

__all__ = ["TARGETS", "Target", "lower", "resolve"]


@dataclass(frozen=True)
class Target:
    """A name, the passes that lower to it, and what it means in one line."""

    name: str
    passes: tuple[str, ...]
    meaning: str


TARGETS: Final = (
    Target(
        "simulate", ("lower-simulate",), "quantize-dequantize in float, weights unpacked once; any device"
    ),
    Target("reference", ("lower-reference",), "exact integer arithmetic in plain torch; any device, slow"),
    Target(
        "cpu",
        ("choose-forms", "lower-reference", "lower-cpu", "fuse", "lower-float", "hoist-invariants"),
        "exact integer arithmetic by native kernels; what they cannot take as in reference, what is slower so simulated",
    ),
)
"""What a program can be lowered for."""


def resolve(target: str | Target) -> Target:
    """The target of a name; `auto` is `cpu` where the library of native kernels is there, else `reference`.

    Raises: PassNotFoundError for an unknown name, with the nearest one.
    Example:
        >>> resolve("reference").passes
        ('lower-reference',)
    """
    if isinstance(target, Target):
        return target
    known = {each.name: each for each in TARGETS}
    if target == "auto":
        return known["cpu" if library() is not None else "reference"]
    if target not in known:
        raise PassNotFoundError(f"there is no target {target!r}; {suggest(target, ['auto', *known])}")
    return known[target]


def lower(program: Program, target: str | Target, ctx: PassContext | None = None) -> Program:
    """The program, lowered for a target.

    Raises: PassNotFoundError as `resolve`; PipelineError for a program that is not ready to be lowered.
    """
    steps = registry.pipeline((name, {}) for name in resolve(target).passes)
    return steps.run(program, ctx or PassContext(), providers=tuple(registry.passes().values()))
