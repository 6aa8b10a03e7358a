"""Programs, calibration rows and passes for the tests of the sweep."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar

import torch
from models import captured
from toys import toy

from dmqfx.calibration.calibration import Calibration
from dmqfx.calibration.rows import Column, Rows
from dmqfx.graph.address import Site
from dmqfx.graph.facts import PLANNED, Fact
from dmqfx.graph.pipeline import PassContext
from dmqfx.graph.program import Program
from dmqfx.graph.registry import pipeline
from dmqfx.graph.table import Entry, Table
from dmqfx.policy.policy import Policy
from dmqfx.sweep.sweep import SweepPass
from dmqfx.sweep.turn import Turn

POLICY = Policy.load(
    {
        "schema": "dmqfx.policy/1",
        "name": "sweep",
        "default": {
            "weight": {"bits": 4, "grid": "symmetric", "per": "channel", "range": "mse"},
            "input": {"bits": 8, "grid": "affine", "per": "tensor", "groups": 4},
        },
        "rules": [
            {"name": "ends", "at": ["conv_in/*", "conv_out/*"], "keep": "float"},
            {"name": "attention", "kind": "attention", "input": {"bits": 8}, "optional": True},
            {"name": "values", "at": "**to_v/*", "input": {"groups": 1, "bits": 6}, "optional": True},
        ],
        "pipeline": ["canonicalize", "flag-skips", "plan-sites"],
    }
)
SWEEP = (("fit-ranges", {}), ("round-weights", {"method": "gptq", "rows": 64}))


@cache
def planned(name: str = "toy") -> Program:
    """The toy, or a model of diffusers, with a plan."""
    program = toy() if name == "toy" else captured(name)[1]
    steps = pipeline([("canonicalize", {}), ("flag-skips", {}), ("plan-sites", {})])
    return steps.run(program, PassContext(POLICY))


def recorded(
    program: Program, *counts: int, seed: int = 0, sizes: Mapping[str, int] | None = None
) -> Calibration:
    """Noise rows at even timesteps; a second group of rows is larger, a third larger still."""
    generator = torch.Generator().manual_seed(seed)
    groups, step = [], program.inputs.multiple_of
    for k, count in enumerate(counts):
        grown = {side: program.inputs.sizes[side] + 2 * k * step for side in "HW"} | dict(sizes or {})
        inputs = program.inputs.draw(generator, B=count, **grown)
        inputs["timestep"] = torch.linspace(999, 0, count)
        each = torch.arange(count)
        columns = {name: Column(value, each) for name, value in inputs.items()}
        groups.append(Rows(columns, torch.zeros_like(each), each))
    return Calibration(tuple(groups))


def context(calibration: Calibration, **changes: object) -> PassContext:
    """A context of four rows at a time."""
    return replace(PassContext(POLICY, calibration, chunk=4), **changes)


def swept(
    program: Program, ctx: PassContext, steps: Sequence[tuple[str, Mapping[str, object]]] = SWEEP
) -> Program:
    """The program behind a sweep."""
    return pipeline(steps).run(program, ctx)


def bits(table: Table) -> dict[str, bytes]:
    """Every tensor of a table, bit for bit."""
    return {
        f"{type(entry).__name__} {site} {name} {list(value.shape)}": value.contiguous().numpy().tobytes()
        for site, entry in table
        for name, value in _tensors(entry)
    }


def _tensors(entry: object) -> Iterable[tuple[str, torch.Tensor]]:
    for name, value in vars(entry).items():
        if isinstance(value, torch.Tensor):
            yield name, value
        elif hasattr(value, "__dict__"):
            yield from _tensors(value)


@dataclass(frozen=True)
class Look(SweepPass):
    """Writes nothing and remembers the turns it was shown, in a list that outlives it."""

    requires: ClassVar[frozenset[Fact]] = frozenset({PLANNED})
    seen: ClassVar[list[Turn]] = []

    def visit(self, turn: Turn, ctx: PassContext) -> Iterable[tuple[Site, Entry]]:
        self.seen.append(turn)
        return ()
