"""Evaluation: what its numbers mean, which floors are missed, and that it measures the model it is given."""

from __future__ import annotations

import math

import pytest
import torch
from models import randomize, unconditional

from dmqfx import emoji
from dmqfx.calibration.calibration import Calibration
from dmqfx.compiler import compile
from dmqfx.errors import CalibrationError
from dmqfx.evaluation import Evaluation, emoji_calibration, evaluate, mean_db, psnr_db
from dmqfx.frontend.signature import UNet
from dmqfx.runtime.unet import CompiledUNet

FOUND = Evaluation({981.0: 20.0, 1.0: 10.0}, (30.0, 25.0))


@pytest.fixture(scope="module")
def unet() -> UNet:
    small = unconditional(
        block_out_channels=(16,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
    )
    randomize(small)
    return small.eval()


@pytest.fixture(scope="module")
def rows(unet: UNet) -> Calibration:
    return Calibration.synthesize(unet, steps=4, trajectories=1, seed=1)


def test_fewer_bits_are_farther_from_float(unet: UNet, rows: Calibration) -> None:
    fine, coarse = (
        evaluate(unet, compile(unet, "w8a16", overrides=[f"default.weight.bits={bits}"], report_rows=0), rows)
        for bits in (8, 3)
    )
    assert fine.output_db.keys() == coarse.output_db.keys() == set(rows.timesteps().tolist())
    assert all(fine.output_db[time] > coarse.output_db[time] + 15 for time in fine.output_db)


@pytest.fixture(scope="module")
def q(unet: UNet) -> CompiledUNet:
    return compile(unet, "w4a16", report_rows=0)


def test_what_is_measured_is_the_output_itself(unet: UNet, q: CompiledUNet, rows: Calibration) -> None:
    """Against the definition, computed here with diffusers' own module."""
    found = evaluate(unet, q, rows)
    for batch in rows.batches(1):
        sample, timestep = batch["sample"], batch["timestep"]
        with torch.no_grad():
            exact, quantized = (model(sample, timestep).sample.double() for model in (unet, q))
        db = 10 * math.log10(exact.square().sum() / (exact - quantized).square().sum())
        assert found.output_db[timestep.item()] == pytest.approx(db, abs=0.01)


def test_the_compiled_model_runs_as_its_target_does(unet: UNet, q: CompiledUNet, rows: Calibration) -> None:
    exact, other = evaluate(unet, q, rows), evaluate(unet, q.retarget("reference"), rows)
    assert other.mean_output_db == pytest.approx(exact.mean_output_db, abs=0.01)


def test_a_model_in_training_mode_is_evaluated_and_left_in_it(
    unet: UNet, q: CompiledUNet, rows: Calibration
) -> None:
    found = evaluate(unet, q, rows)
    unet.train()
    try:
        assert evaluate(unet, q, rows) == found
        assert unet.training
    finally:
        unet.eval()


def test_calls_of_another_model_are_refused(unet: UNet, q: CompiledUNet) -> None:
    wider = unconditional(in_channels=4, out_channels=4)
    with pytest.raises(CalibrationError, match="sample"):
        evaluate(unet, q, Calibration.synthesize(wider, steps=1, trajectories=1))


@pytest.mark.parametrize(
    ("floors", "words"),
    [
        ({"sqnr_db": 15.0, "psnr_db": 27.5}, []),
        ({"sqnr_db": 15.1}, ["the output has 15.0 dB SQNR, 15.1 dB are wanted"]),
        ({"psnr_db": 27.6}, ["the pictures have 27.5 dB PSNR, 27.6 dB are wanted"]),
    ],
)
def test_a_floor_is_reached_or_missed_in_words(floors: dict[str, float], words: list[str]) -> None:
    assert FOUND.misses(**floors) == words


def test_a_result_that_is_no_number_reaches_no_floor() -> None:
    broken = Evaluation({1.0: math.nan}, (math.nan,))
    assert len(broken.misses(sqnr_db=-100, psnr_db=-100)) == 2


def test_a_floor_for_pictures_that_do_not_exist_is_missed() -> None:
    assert Evaluation({1.0: 9.0}).misses(psnr_db=1) == [
        "there are no pictures, and 1 dB PSNR of them are wanted"
    ]


def test_bit_equal_timesteps_do_not_hide_the_others() -> None:
    assert mean_db([math.inf, 10.0, 20.0]) == 15
    assert mean_db([math.inf]) == math.inf
    assert math.isnan(mean_db([]))


@pytest.mark.parametrize(("error", "db"), [(2.0, 0.0), (0.2, 20.0), (0.02, 40.0), (0.0, math.inf)])
def test_psnr_is_against_the_range_of_pictures(error: float, db: float) -> None:
    image = torch.zeros(3, 4, 4)
    assert psnr_db(image, image + error) == pytest.approx(db)


def test_psnr_of_a_picture_that_is_not_finite_is_no_number() -> None:
    assert math.isnan(psnr_db(torch.zeros(3, 4, 4), torch.full((3, 4, 4), math.nan)))


def test_the_printed_table_has_every_timestep_and_the_worst_picture() -> None:
    assert str(FOUND).splitlines() == [
        "timestep  output SQNR dB",
        "     981            20.0",
        "       1            10.0",
        "    mean            15.0",
        "pictures: 2, PSNR 27.5 dB in the mean, 25.0 dB the worst",
    ]


def test_the_emoji_calibration_is_guided_and_shares_no_prompt_with_the_demo() -> None:
    recorded = emoji_calibration(count=1, steps=2)
    assert len(recorded) == 2 * 2
    context = recorded.groups[0].tensors(slice(None))["encoder_hidden_states"]
    shown = emoji.embed(emoji.demo_prompts(16))
    assert torch.equal(context[0], emoji.embed([""])[0])
    assert not any(torch.equal(context[1], each) for each in shown)
