"""The verifier looks at every row of a table that a pass changes, however few the probes look up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar

import pytest
import torch
from models import MODELS
from planting import Plant, spoiled

from dmqfx.checking.verify import verify
from dmqfx.errors import VerifyError
from dmqfx.frontend.capture import capture
from dmqfx.graph import ops
from dmqfx.graph.modules import clone
from dmqfx.graph.pipeline import Pass, PassContext, Preserves, run_step
from dmqfx.graph.program import Program
from dmqfx.graph.registry import passes
from dmqfx.graph.rewrite import Rewriter

aten = torch.ops.aten


def change_row(row: int, factor: float) -> Plant:
    """canonicalize, and one row of the table of an embedding times a factor."""

    def change(table: torch.Tensor) -> torch.Tensor:
        table[row] *= factor
        return table

    def plant(step: str) -> Pass:
        return spoiled(lambda before, after: _with_row(after, change))(step)

    return plant


def _with_row(program: Program, change: Callable[[torch.Tensor], torch.Tensor]) -> Program:
    held = dict(program.weights())
    (node,) = program.calls("embedding")
    name = str(ops.tensor(node, "weight").target)
    return replace(program, gm=clone(program.gm, {**held, name: change(held[name].clone())}))


@cache
def of_classes(count: int) -> Program:
    return capture(MODELS["classes"](num_class_embeds=count))


@cache
def with_learned_time() -> Program:
    return capture(MODELS["learned-time"]())


@dataclass(frozen=True)
class Exactly(Pass):
    """canonicalize with one row of a table changed, as an exact pass."""

    preserves: ClassVar[Preserves] = Preserves.EXACT
    row: int = 4

    def run(self, program: Program, ctx: PassContext) -> Program:
        return change_row(self.row, 1.01)("canonicalize").run(program, ctx)


@pytest.mark.parametrize("row", range(5))
@pytest.mark.parametrize("exact", [False, True])
def test_no_label_of_a_few_is_left_out(row: int, exact: bool) -> None:
    step = Exactly(row) if exact else change_row(row, 1.01)("canonicalize")
    with pytest.raises(VerifyError, match="relative L2 error of sample"):
        verify(of_classes(5), step)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: of_classes(1000), "class_labels"),
        pytest.param(with_learned_time, "timestep", marks=pytest.mark.slow),
    ],
)
def test_one_row_of_a_thousand_shows_and_is_named(make: Callable[[], Program], name: str) -> None:
    with pytest.raises(VerifyError, match=rf"relative L2 error of sample, .* with {name} 777, in float32"):
        verify(make(), change_row(777, 0.0)("canonicalize"))
    assert verify(make(), passes()["canonicalize"]()).error == 0


@dataclass(frozen=True)
class ScaleTable(Pass):
    """W[i]  ->  (W * 2)[i] / 2, but for what is left of one row."""

    preserves: ClassVar[Preserves] = Preserves.EXACT
    missed: int = -1

    def run(self, program: Program, ctx: PassContext) -> Program:
        rw = Rewriter(program, self.name(), ctx.journal)
        node = next(n for n in rw.graph.nodes if ops.is_call(n, "embedding"))
        if ctx.journal.apply(node.meta["address"], "scale"):
            table = rw.value(ops.tensor(node, "weight")) * 2
            if self.missed >= 0:
                table[self.missed] /= 2
            with rw.before(node):
                scaled = rw.like(node, weight=table)
                rw.replace(node, rw.call(aten.div.Tensor, near=scaled, self=scaled, other=2.0))
        return rw.finish()


def test_a_table_may_be_rewritten_where_something_makes_up_for_it() -> None:
    program = run_step(passes()["canonicalize"](), of_classes(40), PassContext())
    assert verify(program, ScaleTable()).error < 1e-14
    with pytest.raises(VerifyError, match=r"rule 'scale' at .*class_embedding/embedding: .* in float64"):
        verify(program, ScaleTable(missed=33))
