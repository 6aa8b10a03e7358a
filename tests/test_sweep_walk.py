"""The walk computes what the float program computes and what the compiled program will compute."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from models import relative
from sweeping import SWEEP, context, output, planned, recorded, swept
from torch import Tensor

from dmqfx.calibration.calibration import Calibration
from dmqfx.graph.pipeline import PassContext
from dmqfx.graph.program import Program
from dmqfx.graph.registry import pipeline
from dmqfx.graph.table import ChannelScale, Planned
from dmqfx.sweep.chunks import chunked
from dmqfx.sweep.values import Pair
from dmqfx.sweep.walk import Walk

MODELS = ("toy", "conditional", "unconditional")
ALL = ("toy", pytest.param("conditional", marks=pytest.mark.slow), "unconditional")
SCALING = (("insert-observers", {}), ("freeze-observers", {}), ("pair-layers", {}), ("learn-scaling", {}))
SCALED = (("apply-scaling", {}),)
FINISH = (("insert-qdq", {}), ("lower-simulate", {}))


def walked(program: Program, data: Calibration, size: int = 4) -> list[Pair]:
    """The outputs of a walk in which nobody decides anything: the table is as it is."""
    outputs: list[Pair] = []
    walk = Walk(program, chunked(data, program, size), memory=2**30, total=len(data))
    walk.run(lambda turn: turn.table, outputs)
    return outputs


def called(program: Program, data: Calibration, size: int = 4) -> list[Tensor]:
    """The program on the same chunks."""
    found = []
    with torch.no_grad():
        for batch in data.batches(size, program.inputs):
            out = program(**batch)
            found.append(out[0] if isinstance(out, tuple) else out)
    return found


def sizes(program: Program, kind: str) -> Calibration:
    """Calibration rows of several kinds."""
    counts = {"one row": (1,), "groups": (5, 3), "few": (6,)}
    if kind == "one timestep":
        rows = recorded(program, 6)
        rows.groups[0].columns["timestep"].values.fill_(500.0)
        return rows
    return recorded(program, *counts[kind])


@pytest.mark.parametrize("name", ALL)
def test_the_float_value_is_the_programs_output_bit_for_bit(name: str) -> None:
    program = planned(name)
    data = recorded(program, 5, 3)
    real = [output(pair.real) for pair in walked(program, data)]
    assert all(map(torch.equal, real, called(program, data)))
    assert len(real) == 3


@pytest.mark.parametrize("name", ALL)
def test_without_entries_the_quantized_value_is_the_float_value_itself(name: str) -> None:
    program = planned(name)
    assert all(pair.same for pair in walked(program, recorded(program, 2)))


KINDS = ("one row", "groups", "few", "one timestep")
FAST = {("toy", kind) for kind in KINDS} | {("unconditional", "groups")}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(name, kind, marks=[pytest.mark.slow] * ((name, kind) not in FAST))
        for name in MODELS
        for kind in KINDS
    ],
)
def test_the_quantized_value_is_what_the_compiled_program_computes(name: str, kind: str) -> None:
    program = planned(name)
    data = sizes(program, kind)
    after = swept(program, context(data))
    compiled = pipeline(FINISH).run(after, PassContext())
    for pair, wanted, exact in zip(
        walked(after, data), called(compiled, data), called(program, data), strict=True
    ):
        assert relative(output(pair.quantized), wanted) < 1e-5
        assert relative(output(pair.quantized), exact) > 1e-3  # it is quantized indeed


@pytest.mark.parametrize("width", ["w4a16", "w4a8"])
def test_a_scale_that_is_learned_and_not_yet_in_the_graph_counts(width: str) -> None:
    """x / gamma goes in and W * gamma takes it back, whether the input is rounded or not."""
    program = planned()
    data = recorded(program, 6)
    learned = pipeline(SCALING).run(program, context(data))
    assert learned.table.of(ChannelScale)
    if width == "w4a16":
        plan = learned.table.of(Planned)
        learned = learned.with_table(
            learned.table.put_all(
                {at: replace(each, spec=None) for at, each in plan.items() if at.arg != "weight"}
            )
        )
    after = swept(learned, context(data), SWEEP if width == "w4a8" else SWEEP[1:])
    compiled = pipeline((*SCALED, *FINISH)).run(after, PassContext())
    for pair, wanted in zip(walked(after, data), called(compiled, data), strict=True):
        assert relative(output(pair.quantized), wanted) < 1e-5


def test_a_scale_whose_weight_is_not_rounded_yet_changes_nothing_but_roundings() -> None:
    program = planned()
    data = recorded(program, 6)
    learned = pipeline(SCALING).run(program, context(data))
    for pair in walked(learned, data):
        assert not pair.same
        assert relative(output(pair.quantized), output(pair.real)) < 1e-5
