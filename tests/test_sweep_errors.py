"""What is wrong with a model or its data is named: the first operation, the row, and what mends it."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from sweeping import SWEEP, chain, changed, context, output_noise, planned, recorded, swept
from torch import Tensor

from dmqfx.calibration.calibration import Calibration, Origin
from dmqfx.errors import CalibrationError
from dmqfx.graph.address import Site
from dmqfx.graph.facts import PLANNED, Fact
from dmqfx.graph.pipeline import PassContext
from dmqfx.graph.program import Program
from dmqfx.graph.registry import pipeline
from dmqfx.graph.table import Codes, Entry, Range
from dmqfx.sweep.sweep import SweepPass
from dmqfx.sweep.turn import Turn

NEAREST = (SWEEP[0], ("round-weights", {"method": "nearest"}))


def message(program: Program, ctx: PassContext, *more: SweepPass) -> str:
    """What a sweep is refused with."""
    with pytest.raises(CalibrationError) as error:
        swept(program, ctx, SWEEP, *more)
    return str(error.value)


def at(place: tuple[int, ...], value: float) -> object:
    """A change of one number of a tensor."""

    def change(tensor: Tensor) -> Tensor:
        tensor[place] = value
        return tensor

    return change


# --- numbers that are not finite


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_broken_weight_is_named_with_its_reader_and_place_before_anything_runs(value: float) -> None:
    program = changed(planned(), mid__to_out__weight=at((2, 5), value))
    said = message(program, context(recorded(program, 2)))
    assert said.startswith(f"mid.to_out.weight, read by mid.to_out/linear, holds {value} at [2, 5]\n  mend: ")


def test_a_broken_weight_is_named_where_nothing_runs_at_all() -> None:
    program = changed(chain(), conv3_bias=at((1,), float("nan")))
    with pytest.raises(CalibrationError, match=r"conv3_bias, read by conv3/conv2d, holds nan at \[1\]"):
        swept(program, PassContext(), NEAREST[1:])


@pytest.mark.parametrize(("chunk", "row"), [(4, 0), (4, 3), (4, 6), (1, 5), (16, 8)])
def test_the_first_operation_that_overflows_is_named_with_its_row(chunk: int, row: int) -> None:
    """The input is finite, and so are the weights, but their products leave float32 in the second convolution."""
    program = changed(chain(), conv1=lambda weight: weight * 1e30)
    data = recorded(program, 9)
    data.groups[0].columns["sample"].values[row] *= 1e10
    said = message(program, context(data, chunk=chunk))
    time = data.timesteps()[row]
    assert said.startswith(
        f"conv1/conv2d: the float network's value is not finite for calibration row {row} (timestep {time:g})\n"
        "  mend: the model itself overflows there"
    )


def test_the_row_is_counted_through_groups_of_other_shapes() -> None:
    program = changed(chain(), conv1=lambda weight: weight * 1e30)
    data = recorded(program, 5, 4)
    data.groups[1].columns["sample"].values[2] *= 1e10
    assert "calibration row 7 (" in message(program, context(data))


def test_an_operation_inside_a_segment_is_named_and_not_the_one_that_shows_it() -> None:
    """The sum with the timestep's projection is not planned; only what is made of it is."""
    program = changed(chain(), time=lambda weight: weight * 1e38, time_bias=lambda bias: bias * 0 + 3e38)
    assert message(program, context(recorded(program, 2))).startswith(
        "time/linear: the float network's value"
    )


def test_infinities_that_nothing_is_left_of_do_no_harm() -> None:
    """sigmoid(inf) is 1: the network's values are finite wherever anybody looks."""
    before = chain()
    swept(changed(before, conv7=lambda weight: weight * 1e38), context(recorded(before, 2)))


@dataclass(frozen=True)
class Overflow(SweepPass):
    """Makes the rounded weight of one operation so large that no product of it survives."""

    requires: ClassVar[frozenset[Fact]] = frozenset({PLANNED})
    where: str = "conv2/conv2d:weight"

    def visit(self, turn: Turn, ctx: PassContext) -> Iterable[tuple[Site, Entry]]:
        site = Site.parse(self.where)
        codes = turn.table.get(site, Codes)
        if turn.readers[0].weight == site and codes is not None:
            params = replace(codes.qparams, scale=codes.qparams.scale * 1e38 * 10)
            yield site, replace(codes, qparams=params)


def test_the_quantized_network_is_watched_too() -> None:
    program = chain()
    said = message(program, context(recorded(program, 3)), Overflow())
    assert said.startswith("conv2/conv2d: the quantized network's value is not finite for calibration row 0")
    assert "keep this operation float in the policy" in said


# --- numbers that are hard


def test_huge_outliers_are_compiled_to_something_finite_and_better_than_nearest() -> None:
    """Features of 1e10 whose channels differ 500 to 1, through skips that read them unnormed."""
    ratio = torch.logspace(0, -2.7, 8)
    program = changed(
        planned(),
        conv_in__weight=lambda weight: weight * 1e10 * ratio.view(8, 1, 1, 1),
        conv_in__bias=lambda bias: bias * 1e10 * ratio,
    )
    data = recorded(program, 16)
    steps = (SWEEP[0], ("round-weights", {"method": "gptq", "rows": 512}))
    after = swept(program, context(data), steps)
    greatest = max(float(seen.high.max()) for seen in after.table.of(Range).values())
    assert greatest > 1e10
    assert all(torch.isfinite(codes.qparams.scale).all() for codes in after.table.of(Codes).values())
    noise, nearest = output_noise(after, data), output_noise(swept(program, context(data), NEAREST), data)
    assert noise < 0.9 * nearest


def test_dead_and_constant_channels_are_rounded_like_any_other() -> None:
    """A channel of zeros, one that is the same everywhere, and a weight whose output is nothing."""
    program = changed(
        chain(),
        conv1=at((2,), 0.0), conv1_bias=at((2,), 0.0), conv2=at((4,), 0.0), conv2_bias=at((4,), 3.0),
        conv5=at((0,), 0.0), conv5_bias=at((0,), 0.0),
    )  # fmt: skip
    data = recorded(program, 6)
    after = swept(program, context(data))
    assert output_noise(after, data) < 0.3


def test_a_program_whose_input_never_varies_is_compiled() -> None:
    program = chain()
    data = recorded(program, 3)
    data.groups[0].columns["sample"].values.fill_(0.5)
    data.groups[0].columns["timestep"].values.fill_(500.0)
    assert output_noise(swept(program, context(data)), data) < 0.3


# --- data that are few or wrong


def test_a_batch_of_one_is_enough() -> None:
    program = planned()
    data = recorded(program, 1)
    assert output_noise(swept(program, context(data)), data) < 0.5


def test_groups_without_rows_are_said(caplog: pytest.LogCaptureFixture) -> None:
    program = chain()
    data = recorded(program, 3)  # at timesteps 999, 499.5 and 0; groups begin at 0, 250, 500 and 750
    with caplog.at_level(logging.WARNING, "dmqfx"):
        swept(program, context(data))
        assert "1 of 4 timestep groups have no calibration row (2); they take the nearest" in caplog.text
        caplog.clear()
        swept(program, context(recorded(program, 8)))
        assert caplog.text == ""


def test_no_calibration_is_asked_for_by_name() -> None:
    with pytest.raises(CalibrationError, match="fit-ranges needs calibration data; pass calibration="):
        swept(chain(), PassContext())


def test_an_empty_calibration_is_refused() -> None:
    with pytest.raises(CalibrationError, match="the calibration is empty"):
        swept(chain(), context(Calibration(())))


def test_the_calibration_of_another_model_is_refused() -> None:
    data = recorded(planned(), 2)  # three channels, and four are wanted
    with pytest.raises(
        CalibrationError, match=r"does not fit this UNet2DModel: sample is \[3, 8, 8\] and should be"
    ):
        swept(chain(), context(data))
    other = replace(recorded(chain(), 2), origins=(Origin("tape", "ControlNetModel", "", ""),))
    with pytest.raises(CalibrationError, match="it is another kind of model"):
        swept(chain(), context(other))


def test_nearest_alone_needs_no_calibration() -> None:
    after = swept(chain(), PassContext(), NEAREST[1:])
    assert len(after.table.of(Codes)) == 9


def test_observers_in_the_graph_are_identities_to_a_sweep() -> None:
    watched = pipeline([("insert-observers", {})]).run(chain(), PassContext())
    ctx = context(recorded(chain(), 2))
    plain, seen = (swept(program, ctx).table.of(Codes) for program in (chain(), watched))
    assert plain.keys() == seen.keys()
    assert all(torch.equal(plain[site].packed, seen[site].packed) for site in plain)
