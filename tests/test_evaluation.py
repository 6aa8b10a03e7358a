"""Evaluation: what its numbers mean, which floors are missed, and that it measures the model it is given."""

from __future__ import annotations

import copy
import json
import math
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import randomize, unconditional

import dmqfx
from dmqfx import emoji
from dmqfx.calibration.calibration import Calibration
from dmqfx.calibration.recording import recording
from dmqfx.compiler import compile
from dmqfx.errors import CalibrationError, DmqfxError
from dmqfx.evaluation import Evaluation, OtherWeightsWarning, emoji_calibration, evaluate, mean_db, psnr_db
from dmqfx.frontend.signature import UNet
from dmqfx.judging.features import HAAR
from dmqfx.judging.findings import Run, Spread
from dmqfx.judging.frechet import Gaussian
from dmqfx.judging.outputs import Output
from dmqfx.judging.protocol import prompts_hash
from dmqfx.judging.reference import RESIZE
from dmqfx.judging.samplers import EmojiSampler
from dmqfx.judging.tables import NAMES
from dmqfx.runtime.unet import CompiledUNet

FIRST = Run(
    {981.0: Output(20.0, 0.9, 12.0, 15.0), 1.0: Output(10.0, 0.8, 2.0, 5.0)},
    seed=1,
    guidance_scale=3.0,
    drift=((981.0, 0.01), (1.0, 0.02)),
    psnr_db=(30.0, 25.0),
    ssim=(0.98, 0.94),
    frechet={"to_float": 0.5},
)
SECOND = Run({981.0: Output(22.0, 1.0), 1.0: Output(12.0, 1.0)}, seed=2, psnr_db=(20.5,), ssim=(0.9,))
FOUND = Evaluation((FIRST,))


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_weights_than_those_that_were_compiled_are_told(
    unet: UNet, q: CompiledUNet, rows: Calibration, tmp_path: Path, dtype: torch.dtype
) -> None:
    q.save_pretrained(tmp_path)
    loaded, other = dmqfx.load(tmp_path), copy.deepcopy(unet)
    with warnings.catch_warnings():
        warnings.simplefilter("error", OtherWeightsWarning)
        evaluate(
            copy.deepcopy(unet).to(dtype), loaded, rows, rows=1
        )  # a half precision copy is no other model
    with torch.no_grad():
        other.conv_out.weight[1, 2, 1, 1] += 0.5
    told = "the compiled model was made from other weights than those of this float UNet2DModel"
    with pytest.warns(OtherWeightsWarning, match=told):
        evaluate(other.to(dtype), loaded, rows, rows=1)


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


# --- floors


@pytest.mark.parametrize(
    ("floors", "words"),
    [
        ({"sqnr_db": 15.0, "psnr_db": 27.5, "ssim": 0.96}, []),
        ({"sqnr_db": 15.1}, ["the output has 15.0 dB SQNR, 15.1 dB are wanted"]),
        ({"psnr_db": 27.6}, ["the pictures have 27.5 dB PSNR, 27.6 dB are wanted"]),
        ({"ssim": 0.97}, ["the pictures have an SSIM of 0.960, 0.97 is wanted"]),
    ],
)
def test_a_floor_is_reached_or_missed_in_words(floors: dict[str, float], words: list[str]) -> None:
    assert FOUND.misses(**floors) == words


def test_a_floor_is_for_the_mean_over_runs() -> None:
    both = Evaluation((FIRST, SECOND))
    assert both.misses(sqnr_db=16, psnr_db=24, ssim=0.925) == []
    assert len(both.misses(sqnr_db=16.1, psnr_db=24.1, ssim=0.94)) == 3


def test_a_result_that_is_no_number_reaches_no_floor() -> None:
    broken = Evaluation((Run({1.0: Output(math.nan, 1.0)}, psnr_db=(math.nan,), ssim=(math.nan,)),))
    assert len(broken.misses(sqnr_db=-100, psnr_db=-100, ssim=-1)) == 3


def test_a_result_of_zero_reaches_a_floor_below_it() -> None:
    assert Evaluation((Run({1.0: Output(0.0, 0.0)}, psnr_db=(0.0,)),)).misses(sqnr_db=-1, psnr_db=-1) == []


def test_a_floor_for_pictures_that_do_not_exist_is_missed() -> None:
    outputs = {1.0: Output(9.0, 1.0)}
    assert Evaluation((Run(outputs),)).misses(psnr_db=1, ssim=0.5) == [
        "there are no pictures, and 1 dB PSNR of them are wanted",
        "there are no pictures, and an SSIM of 0.5 of them are wanted",
    ]
    assert Evaluation((Run(outputs, psnr_db=(9.0,)),)).misses(ssim=0.5) == [
        "the pictures are too small, and an SSIM of 0.5 of them are wanted"
    ]


# --- means and spread


def test_bit_equal_timesteps_do_not_hide_the_others() -> None:
    assert mean_db([math.inf, 10.0, 20.0]) == 15
    assert mean_db([math.inf]) == math.inf
    assert math.isnan(mean_db([]))


def test_a_spread_is_the_sample_deviation_and_of_one_run_there_is_none() -> None:
    assert Spread.of([1.0, 2.0, 6.0]) == Spread(3.0, pytest.approx(7**0.5))
    assert Spread.of([4.0]) == Spread(4.0, None)


def test_every_measure_is_averaged_over_timesteps_or_pictures_and_then_over_runs() -> None:
    found = Evaluation((FIRST, SECOND)).summary()
    assert found["output_db"] == Spread(16.0, pytest.approx(2**0.5))
    assert found["psnr_db"] == Spread(24.0, pytest.approx(7 * 0.5**0.5))
    assert found["gain"].mean == pytest.approx(0.925)
    assert found["difference_db"] == Spread(7.0, None)
    assert found["guided_db"].mean == 10
    assert found["drift"].mean == 0.02
    assert found["frechet_to_float"].mean == 0.5
    assert "lpips" not in found


def test_first_and_last_steps_are_told_where_they_do_not_overlap() -> None:
    outputs = {float(20 - k): Output(float(k), 1.0) for k in range(12)}
    numbers = Run(outputs).numbers()
    assert (numbers["first_db"], numbers["last_db"]) == (2, 9)
    assert "first_db" not in FIRST.numbers()


def test_every_number_has_a_name_in_words() -> None:
    full = replace(
        FIRST,
        outputs={float(20 - k): Output(1.0, 1.0, 1.0, 1.0) for k in range(12)},
        lpips=(0.1,),
        frechet=dict.fromkeys(("to_float", "to_reference", "of_float_to_reference"), 0.5),
    )
    assert full.numbers().keys() == NAMES.keys()


# --- as words and as data


def test_the_printed_table_has_every_timestep_and_the_worst_picture() -> None:
    assert str(FOUND).splitlines() == [
        "timestep  output SQNR dB    gain  cond - uncond dB  guided dB   drift",
        "     981            20.0  0.9000              12.0       15.0  0.0100",
        "       1            10.0  0.8000               2.0        5.0  0.0200",
        "",
        "                                           mean  worst picture",
        "output SQNR, dB                            15.0",
        "output gain                              0.8500",
        "SQNR of cond - uncond, dB                   7.0",
        "SQNR of the guided output, dB              10.0",
        "drift after the last step                0.0200",
        "picture PSNR, dB                           27.5           25.0",
        "picture SSIM                             0.9600         0.9400",
        "Fréchet distance to the float pictures  0.50000",
        "",
        "1 run, guided at 3",
    ]


@pytest.mark.parametrize(("pictures", "told"), [((25.0, math.nan, 30.0), "nan"), ((30.0, 25.0), "25.0")])
def test_a_picture_that_is_no_number_is_the_worst(pictures: tuple[float, ...], told: str) -> None:
    found = str(Evaluation((replace(FIRST, psnr_db=pictures),)))
    assert next(line for line in found.splitlines() if line.startswith("picture PSNR")).split()[-1] == told


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"steps": 2}, "PNDM, 2 steps in 3 calls, guided"),
        ({"steps": 3}, "PNDM, 3 steps, guided"),
        ({"steps": None}, "PNDM, 3 calls, guided"),
    ],
)
def test_steps_are_those_that_were_asked_for_and_calls_are_told_where_they_are_others(
    settings: dict[str, int | None], told: str
) -> None:
    run = replace(FIRST, drift=((981.0, 0.01), (981.0, 0.03), (1.0, 0.02)))
    about = {"scheduler": "PNDM", "pictures_per_run": 2, "features": "", "lpips": "", "settings": settings}
    found = str(Evaluation((run, run), about))
    assert told in found
    assert [line.split()[-1] for line in found.splitlines()[1:3]] == ["0.0300", "0.0200"]  # of two, the last


def test_timesteps_that_are_near_each_other_are_kept_apart() -> None:
    outputs = {time: Output(time, 1.0) for time in (981.0, 0.1234567, 0.1234568)}
    found = Evaluation((Run(outputs),)).to_data()["output_db"]
    assert found == {"981": 981.0, "0.1234568": 0.1234568, "0.1234567": 0.1234567}


def test_columns_of_what_was_not_measured_are_left_out_and_runs_are_averaged() -> None:
    lines = str(Evaluation((replace(SECOND, psnr_db=(), ssim=()),) * 2)).splitlines()
    assert lines[:2] == ["timestep  output SQNR dB    gain", "     981            22.0  1.0000"]
    assert lines[4:6] == [
        "                   mean  deviation over runs",
        "output SQNR, dB    17.0                 0.00",
    ]


def test_as_data_every_run_is_there_with_every_timestep_and_picture() -> None:
    data = json.loads(json.dumps(Evaluation((FIRST, SECOND), {"seeds": [1, 2]}).to_data()))
    assert data["output_db"] == {"981": 21, "1": 11}
    assert data["image_db"] == [30, 25, 20.5]
    assert (data["mean_output_db"], data["mean_image_db"]) == (16, 24)
    assert data["summary"]["psnr_db"]["deviation"] == pytest.approx(7 * 0.5**0.5)
    assert [run["seed"] for run in data["runs"]] == [1, 2]
    assert data["runs"][0]["timesteps"][1] == {
        "timestep": 1, "sqnr_db": 10, "gain": 0.8, "difference_db": 2, "guided_db": 5
    }  # fmt: skip
    assert data["runs"][0]["drift"][1] == {"timestep": 1, "distance": 0.02}
    assert data["protocol"] == {"seeds": [1, 2]}


# --- runs


def test_each_recording_is_a_run(unet: UNet, q: CompiledUNet, rows: Calibration) -> None:
    other = Calibration.synthesize(unet, steps=4, trajectories=1, seed=2)
    found = evaluate(unet, q, [rows, other])
    alone = [evaluate(unet, q, each) for each in (rows, other)]
    assert found.runs == (alone[0].runs[0], alone[1].runs[0])
    assert found.protocol["rows_recorded"] == [4, 4]
    assert [origins[0]["settings"]["seed"] for origins in found.protocol["recorded"]] == [1, 2]


def test_nothing_to_compare_on_is_refused(unet: UNet, q: CompiledUNet, rows: Calibration) -> None:
    sampler = EmojiSampler(emoji.demo_prompts(1))
    with pytest.raises(CalibrationError, match="there is nothing to compare on"):
        evaluate(unet, q)
    with pytest.raises(CalibrationError, match="2 recordings for 3 seeds"):
        evaluate(unet, q, [rows, rows], sampler=sampler, seeds=(1, 2, 3))
    with pytest.raises(CalibrationError, match="at least one seed"):
        evaluate(unet, q, sampler=sampler, seeds=())


def test_a_reference_that_is_not_there_is_refused_before_anything_is_drawn(
    unet: UNet, q: CompiledUNet
) -> None:
    with pytest.raises(DmqfxError, match="there is no nowhere to take reference pictures from"):
        evaluate(unet, q, sampler=EmojiSampler(["ghost"]), reference=Path("nowhere"))


@pytest.fixture(scope="module")
def emoji_q() -> CompiledUNet:
    return compile(emoji.load_unet(), "w4a16", report_rows=0)


@pytest.fixture(scope="module")
def drawn(emoji_q: CompiledUNet) -> Evaluation:
    """Two seeds of two prompts, three steps."""
    sampler = EmojiSampler(emoji.demo_prompts(2), steps=3)
    return evaluate(
        emoji.load_unet(), emoji_q, sampler=sampler, seeds=(5, 6), rows=None, reference=emoji.REFERENCE
    )


def test_pictures_of_both_models_are_paired_by_their_noise(drawn: Evaluation, emoji_q: CompiledUNet) -> None:
    for run in drawn.runs:
        f, q = (
            emoji.decode(emoji.sample(model, emoji.demo_prompts(2), steps=3, seed=run.seed or 0))
            for model in (emoji.load_unet(), emoji_q)
        )
        assert run.psnr_db == tuple(psnr_db(a, b) for a, b in zip(f, q, strict=True))
        assert all(db > 15 for db in run.psnr_db)
        assert all(0.5 < each < 1 for each in run.ssim)


def test_outputs_are_compared_along_the_trajectory_of_the_float_model(
    drawn: Evaluation, emoji_q: CompiledUNet
) -> None:
    """By hand: every call that the float model had for seed 5, as the sampler batched it."""
    unet = emoji.load_unet()
    with recording(unet) as tape:
        emoji.sample(unet, emoji.demo_prompts(2), steps=3, seed=5)
    for time, output in drawn.runs[0].outputs.items():
        calls = tape.calibration().groups[0]
        batch = calls.tensors((calls.columns["timestep"].rows(slice(None)) == time).nonzero().flatten())
        with torch.no_grad():
            f, q = (
                model(batch["sample"], time, batch["encoder_hidden_states"], return_dict=False)[0].double()
                for model in (unet, emoji_q)
            )
        assert output.sqnr_db == pytest.approx(db(f, q), abs=0.01)
        assert output.gain == pytest.approx(float((f * q).sum() / f.square().sum()), abs=1e-4)
        (u, c), (uq, cq) = f.chunk(2), q.chunk(2)
        assert output.difference_db == pytest.approx(db(c - u, cq - uq), abs=0.01)
        assert output.guided_db == pytest.approx(db(u + 3 * (c - u), uq + 3 * (cq - uq)), abs=0.01)


def db(exact: torch.Tensor, approximate: torch.Tensor) -> float:
    return 10 * math.log10(exact.square().sum() / (exact - approximate).square().sum())


def test_drift_starts_small_and_is_told_for_every_step(drawn: Evaluation) -> None:
    for run in drawn.runs:
        assert [time for time, _ in run.drift] == list(run.outputs)
        distances = [distance for _, distance in run.drift]
        assert 0 < distances[0] < distances[-1] < 1


def test_pictures_are_measured_against_the_reference_too(drawn: Evaluation) -> None:
    for run in drawn.runs:
        assert run.frechet.keys() == {"to_float", "to_reference", "of_float_to_reference"}
        assert run.frechet["to_float"] < run.frechet["to_reference"]


def test_the_protocol_is_all_that_is_needed_to_do_it_again(drawn: Evaluation, emoji_q: CompiledUNet) -> None:
    p = drawn.protocol
    assert (p["seeds"], p["pictures_per_run"], p["prompts"]) == ([5, 6], 2, 2)
    assert p["prompts_sha256"] == prompts_hash(emoji.demo_prompts(2))
    assert (p["scheduler"], p["scheduler_config"]["prediction_type"]) == ("DDIMScheduler", "v_prediction")
    assert p["timesteps"] == list(drawn.runs[0].outputs)
    assert (p["settings"], [run.guidance_scale for run in drawn.runs]) == ({"steps": 3}, [3.0, 3.0])
    assert (p["rows_recorded"], p["guided_pairs_recorded"]) == ([12, 12], [6, 6])
    assert p["compiled"]["policy"] == "w4a16"
    assert p["compiled"]["provenance"]["fingerprint"] == emoji_q.provenance["fingerprint"]
    assert p["reference"] == {
        "pictures": 1026,
        "sha256": Gaussian.load(emoji.REFERENCE).digest,
        "size": [32, 32],
        "resize": RESIZE,
    }
    assert p["features"] == HAAR.name
    assert p["lpips"].startswith("not measured")
    assert {"dmqfx", "torch", "diffusers", "python"} <= p["versions"].keys()
    assert {"processor", "threads", "device"} <= p["machine"].keys()
    assert json.loads(json.dumps(p)) == p


def test_given_recordings_are_used_for_outputs_and_the_sampler_for_pictures(
    drawn: Evaluation, emoji_q: CompiledUNet
) -> None:
    calls = emoji_calibration(count=1, steps=2)
    sampler = EmojiSampler(emoji.demo_prompts(2), steps=3)
    found = evaluate(emoji.load_unet(), emoji_q, calls, sampler=sampler, seeds=(5, 6))
    assert set(found.output_db) == set(calls.timesteps().tolist())
    assert [run.psnr_db for run in found.runs] == [run.psnr_db for run in drawn.runs]


def test_the_emoji_calibration_is_guided_and_shares_no_prompt_with_the_demo() -> None:
    recorded = emoji_calibration(count=1, steps=2)
    assert len(recorded) == 2 * 2
    context = recorded.groups[0].tensors(slice(None))["encoder_hidden_states"]
    shown = emoji.embed(emoji.demo_prompts(16))
    assert torch.equal(context[0], emoji.embed([""])[0])
    assert not any(torch.equal(context[1], each) for each in shown)
