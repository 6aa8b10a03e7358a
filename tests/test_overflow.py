"""A model whose weights are finite and whose values are not: the first operation is named, whoever looks first."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from models import unconditional

from dmqfx import Calibration, compile
from dmqfx.calibration.calibration import CalibrationWarning
from dmqfx.compiler import QualityWarning
from dmqfx.errors import CalibrationError

FIRST = "down_blocks.0.resnets.0.conv2/conv2d"
NAMED = rf"^{re.escape(FIRST)}: the float network's value is not finite for calibration "
MEND = r"\n  mend: the model itself overflows there; look at its weights, or leave the row out$"


def policy(*steps: object) -> Mapping[str, object]:
    ends = [{"round-weights": {"method": "nearest"}}, "insert-qdq"]
    about = {"schema": "dmqfx.policy/1", "name": "short", "extends": "w4a8-quick"}
    return {**about, "pipeline": ["canonicalize", *steps, *ends]}


def sound() -> UNet2DModel:
    kinds = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    return unconditional(block_out_channels=(8,), **kinds).eval()


@pytest.fixture(scope="module")
def rows() -> Calibration:
    """What a sound model of the same kind receives."""
    return Calibration.synthesize(sound(), steps=3, trajectories=2)


@pytest.fixture(scope="module")
def unet() -> UNet2DModel:
    """Finite weights, of which sums leave float32."""
    made = sound()
    with torch.no_grad():
        made.down_blocks[0].resnets[0].conv2.weight.fill_(3e38)
    return made


@pytest.mark.parametrize("steps", [("flag-skips", "plan-sites", "fit-ranges"),
                                   ("plan-sites", "insert-observers", "freeze-observers"),
                                   ("plan-sites", "fit-ranges")], ids=lambda steps: steps[-1] + steps[0])  # fmt: skip
@pytest.mark.filterwarnings(
    "ignore::dmqfx.calibration.calibration.CalibrationWarning"
)  # rows of the sound one
def test_whatever_streams_rows_first_names_the_operation_and_the_row(
    steps: tuple[str, ...], unet: UNet2DModel, rows: Calibration
) -> None:
    where = "row of trajectory 0, step 0" if "fit-ranges" not in steps or "flag-skips" in steps else "row 0"
    with pytest.raises(CalibrationError, match=NAMED + rf"{where} \(timestep \d+\)" + MEND):
        compile(unet, policy(*steps), calibration=rows, report_rows=0)


def test_the_row_that_overflows_is_named_and_not_the_first(rows: Calibration) -> None:
    made, late = sound(), rows.select(6, torch.Generator())
    with torch.no_grad():
        made.conv_in.weight.mul_(1e10)
    late.groups[0].columns["sample"].values[4].mul_(1e30)
    place = f"trajectory {int(rows.trajectories()[4])}, step {int(rows.steps()[4])} "
    with (
        pytest.warns(CalibrationWarning, match="other weights"),
        pytest.raises(CalibrationError, match=rf"^conv_in/conv2d: .* row of {place}"),
    ):
        compile(made, policy("plan-sites", "insert-observers", "freeze-observers"), calibration=late)


@pytest.mark.parametrize(
    "given", [{}, {"scheduler": DDIMScheduler(), "steps": 2, "trajectories": 1}], ids=len
)
def test_a_calibration_that_is_made_names_the_operation(given: dict[str, object], unet: UNet2DModel) -> None:
    with pytest.raises(CalibrationError, match=NAMED + rf"call at timestep {500 if given else 999}" + MEND):
        Calibration.record(unet, **given) if given else compile(unet, "w8a16")
    assert not unet._forward_hooks


@pytest.mark.filterwarnings("ignore:the calibration was recorded from other weights")
def test_where_only_the_report_looks_the_operation_is_a_warning(unet: UNet2DModel, rows: Calibration) -> None:
    said = "nothing could be measured of some rows: " + NAMED[1:] + "row of trajectory 0, step 0 "
    with pytest.warns(CalibrationWarning, match=said):
        q = compile(unet, "w8a16", calibration=rows, report_rows=3)
    assert f"NOT FINITE: {FIRST} is the first layer" in str(q.report)


def test_a_sound_model_is_compiled_in_silence(rows: Calibration) -> None:
    unet = sound()
    own = Calibration.synthesize(unet, steps=2, trajectories=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CalibrationWarning)
        warnings.simplefilter("ignore", QualityWarning)
        compile(unet, "w8a16", calibration=own, report_rows=2)
