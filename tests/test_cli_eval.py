"""dmqfx eval as its user meets it: pipelines, seeds, the results file, gates, and what it refuses."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import randomize
from safetensors.torch import save_file

from dmqfx import Calibration, emoji
from dmqfx.cli import main, terminal
from dmqfx.compiler import compile

ROOT = Path(__file__).parent.parent
Ask = Callable[..., tuple[int, str, str]]
DRAW = ("--prompts", "prompts.txt", "--steps", "2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pipe/ in float, its UNet compiled into q/, the bundled model into emoji-q/, prompts and features."""
    home = tmp_path_factory.mktemp("eval")
    tiny = runpy.run_path(str(ROOT / "examples" / "tiny_pipeline.py"))["tiny_pipeline"]()
    randomize(tiny.unet)
    tiny.save_pretrained(home / "pipe")
    compile(tiny.unet, "w4a16", report_rows=0, progress=False).save_pretrained(home / "q")
    compile(emoji.load_unet(), "w4a16", report_rows=0, progress=False).save_pretrained(home / "emoji-q")
    (home / "prompts.txt").write_text("a cat\n\na dog\n")
    (home / "emoji.txt").write_text("ghost\nred apple\n")
    (home / "strange.txt").write_text("a zebroid\n")
    (home / "colours.py").write_text("def mean(pictures):\n    return pictures.mean((2, 3))\n")
    (home / "broken.py").write_text("def mean(\n")
    for name in ("no.npz", "no.safetensors"):
        (home / name).write_text("neither arrays nor tensors")
    save_file({"other": torch.ones(2)}, home / "other.safetensors")
    np.save(home / "empty.npy", np.zeros((0, 8, 8, 3), dtype=np.uint8))
    np.save(home / "one.npy", np.zeros((1, 8, 8, 3), dtype=np.uint8))
    Calibration.synthesize(tiny.unet, steps=2, trajectories=1).save(home / "made")
    np.save(home / "reference.npy", np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), dtype=np.uint8))
    return home


@pytest.fixture
def ask(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ask:
    """Runs `dmqfx eval` in the folder: exit code, standard output, standard error."""
    monkeypatch.chdir(folder)

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main(["eval", *arguments])
        except SystemExit as stopped:  # argparse
            code = int(stopped.code or 0)
        told = capsys.readouterr()
        return code, told.out, told.err

    return run


def data(answer: tuple[int, str, str]) -> Any:
    assert answer[0] == 0, answer[2]
    return json.loads(answer[1])


def test_a_pipeline_is_run_with_both_unets_over_seeds_and_all_of_it_is_kept(ask: Ask, folder: Path) -> None:
    seeds = ("--seed", "4", "--seed", "5")
    found = data(ask("q", "pipe", *DRAW, *seeds, "--guidance", "4", "--out", "new/r.json", "--json"))
    assert json.loads((folder / "new" / "r.json").read_text()) == found
    assert [run["seed"] for run in found["runs"]] == [4, 5]
    assert [(len(r["timesteps"]), len(r["drift"]), len(r["psnr_db"])) for r in found["runs"]] == [
        (2, 2, 2)
    ] * 2
    assert found["runs"][0]["psnr_db"] != found["runs"][1]["psnr_db"]
    assert found["summary"]["psnr_db"]["deviation"] > 0
    assert found["protocol"]["prompts"] == 2
    assert {run["guidance_scale"] for run in found["runs"]} == {4}
    assert all(row["guided_db"] is not None for run in found["runs"] for row in run["timesteps"])


def test_the_same_command_finds_the_same(ask: Ask) -> None:
    assert ask("q", "pipe", *DRAW)[:2] == ask("q", "pipe", *DRAW)[:2]


def test_another_scheduler_draws_by_its_own_timesteps(ask: Ask) -> None:
    found = data(ask("q", "pipe", *DRAW, "--scheduler", "EulerDiscreteScheduler", "--json"))
    assert found["protocol"]["scheduler"] == "EulerDiscreteScheduler"
    assert found["protocol"]["timesteps"] == [row["timestep"] for row in found["runs"][0]["timesteps"]]
    assert (
        "EulerDiscreteScheduler, 2 steps"
        in ask("q", "pipe", *DRAW, "--scheduler", "EulerDiscreteScheduler")[1]
    )


def test_a_scheduler_whose_package_is_missing_is_refused_with_its_name(
    ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As diffusers stands in for it."""

    class Dummy:
        _backends = ("torch", "sde_package")

    monkeypatch.setattr("diffusers.DPMSolverSDEScheduler", Dummy)
    code, _, said = ask("q", "pipe", *DRAW, "--scheduler", "DPMSolverSDEScheduler")
    assert (code, "DPMSolverSDEScheduler needs sde_package\n  mend: pip install sde_package" in said) == (
        1,
        True,
    )


def test_features_and_a_reference_can_be_given(ask: Ask) -> None:
    given = ("--features", "colours:mean", "--reference", "reference.npy")
    found = data(ask("q", "pipe", *DRAW, *given, "--json"))
    assert found["protocol"]["features"] == "colours:mean"
    assert found["protocol"]["reference"]["pictures"] == 9
    assert found["runs"][0]["frechet"].keys() == {"to_float", "to_reference", "of_float_to_reference"}


def test_a_unet_alone_has_a_run_for_each_seed_and_no_pictures(ask: Ask) -> None:
    found = data(ask("q", "pipe/unet", "--seed", "4", "--seed", "5", "--rows", "8", "--json"))
    assert [origins[0]["settings"]["seed"] for origins in found["protocol"]["recorded"]] == [4, 5]
    assert len(found["runs"]) == 2
    assert found["mean_image_db"] is None


def test_nothing_is_told_of_what_was_not_measured(ask: Ask) -> None:
    """No distance of one picture, no guidance of calls without pairs."""
    assert "Fréchet" not in ask("emoji-q", "emoji", "--pictures", "1", "--steps", "2")[1]
    assert "guided" not in ask("q", "pipe/unet", "--calibration", "made", "--guidance", "7")[1]


def test_recordings_are_runs(ask: Ask) -> None:
    assert main(["calibrate", "pipe", "--prompts", "prompts.txt", "--steps", "2", "--out", "cal"]) == 0
    recorded = ("--calibration", "cal", "--calibration", "cal")
    found = data(ask("q", "pipe", *recorded, "--guidance", "2", "--json"))
    assert found["runs"][0] == found["runs"][1]
    assert found["protocol"]["recorded"][0][0]["how"] == "pipeline"
    assert found["runs"][0]["timesteps"][0]["guided_db"] > 0


def test_the_bundled_model_is_compared_in_pictures_and_with_its_training_images(ask: Ask) -> None:
    few = ("--pictures", "2", "--steps", "2", "--json")
    found = data(ask("emoji-q", "emoji", *few))
    assert found["protocol"]["prompts"] == found["protocol"]["pictures_per_run"] == 2
    assert found["protocol"]["reference"]["pictures"] == 1026
    assert len(found["runs"][0]["ssim"]) == 2


@pytest.mark.slow
def test_the_bundled_model_is_compared_by_other_features_and_on_other_prompts(ask: Ask) -> None:
    few = ("--pictures", "2", "--steps", "2", "--json")
    found = data(ask("emoji-q", "emoji", *few))
    assert "reference" not in data(ask("emoji-q", "emoji", *few, "--features", "colours:mean"))["protocol"]
    own = data(ask("emoji-q", "emoji", "--prompts", "emoji.txt", "--steps", "2", "--guidance", "1", "--json"))
    assert own["protocol"]["prompts_sha256"] != found["protocol"]["prompts_sha256"]
    assert own["runs"][0]["guidance_scale"] == 1


@pytest.mark.parametrize(
    ("gate", "words"),
    [
        (("--min-sqnr", "90"), "the output has "),
        (("--min-psnr", "90"), "the pictures have "),
        (("--min-ssim", "0.5"), "the pictures are too small, and an SSIM of 0.5 of them are wanted"),
    ],
)
def test_a_missed_gate_is_exit_code_3_and_the_results_are_kept(
    ask: Ask, folder: Path, gate: tuple[str, str], words: str
) -> None:
    (folder / "r.json").unlink(missing_ok=True)
    code, out, err = ask("q", "pipe", *DRAW, "--out", "r.json", *gate)
    assert code == terminal.MISSED
    assert f"dmqfx: gate missed: {words}" in err
    assert out.startswith("timestep")
    assert "mean_output_db" in json.loads((folder / "r.json").read_text())


def test_gates_that_are_met_are_exit_code_0(ask: Ask) -> None:
    assert ask("q", "pipe", *DRAW, "--min-sqnr", "-50", "--min-psnr", "-50")[0] == 0


@pytest.mark.slow
def test_a_gate_of_ssim_is_met_or_missed_by_pictures_that_are_large_enough(ask: Ask) -> None:
    assert ask("emoji-q", "emoji", "--pictures", "1", "--steps", "2", "--min-ssim", "0.1")[0] == 0
    assert ask("emoji-q", "emoji", "--pictures", "1", "--steps", "2", "--min-ssim", "1")[0] == terminal.MISSED


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("q pipe --steps 3", 1, "--steps: for pictures, and none are drawn; say --prompts or --pictures"),
        ("q pipe --scheduler DDIMScheduler --reference r", 1, "--scheduler, --reference: for pictures"),
        ("q pipe --prompts prompts.txt --pictures 2", 1, "--pictures is for a model that needs no --prompts"),
        ("q pipe --pictures 2", 1, "needs at least one prompt"),
        ("q pipe/unet --prompts prompts.txt", 1, "pipe/unet is not a pipeline folder"),
        (
            "q pipe --prompts prompts.txt --scheduler EulerDiscretScheduler",
            1,
            "near it: EulerDiscreteScheduler",
        ),
        (
            "q pipe --prompts prompts.txt --scheduler UNet2DModel",
            1,
            "diffusers has no scheduler 'UNet2DModel'",
        ),
        (
            "emoji-q emoji --scheduler FlowMatchEulerDiscreteScheduler",
            1,
            "FlowMatchEulerDiscreteScheduler cannot draw with this model: AttributeError: ",
        ),
        (
            "q pipe --prompts prompts.txt --scheduler RePaintScheduler",
            1,
            "velocity that a UNet predicts, such as DDIMS",
        ),
        (
            "emoji-q emoji --scheduler UnCLIPScheduler",
            1,
            "UnCLIPScheduler cannot draw with this model: ValueError",
        ),
        ("emoji-q emoji --scheduler VQDiffusionScheduler", 1, "cannot draw with this model: TypeError"),
        ("emoji-q emoji --scheduler PNDMScheduler --steps 2", 1, "PNDMScheduler makes no 2 steps"),
        ("q pipe --prompts prompts.txt --steps 5000", 1, "DDIMScheduler makes no 5000 steps"),
        ("q pipe --prompts prompts.txt --reference nowhere", 1, "there is no nowhere to take reference"),
        ("q pipe --prompts prompts.txt --features colours", 1, "write module:function"),
        ("emoji-q emoji --prompts strange.txt", 1, "the emoji model does not know the word 'zebroid'"),
        ("emoji-q emoji --calibration nowhere", 1, "nowhere"),
        ("q pipe --out pipe", 1, "pipe is a folder; say the file to write"),
        ("q pipe --min-ssim high", 2, "argument --min-ssim: must be a number, not 'high'"),
        ("q pipe --min-sqnr nan", 2, "argument --min-sqnr: must be a number, not 'nan'"),
        ("emoji-q emoji --guidance inf", 2, "argument --guidance: must be a finite number, not 'inf'"),
        ("q pipe --seed 18446744073709551616", 2, "argument --seed: must be less than 2^62"),
        ("q pipe/unet --calibration made --seed 2", 1, "--seed is of the noise that calls are made from"),
        ("emoji-q emoji --pictures 1 --reference reference.npy", 1, "takes at least 2 pictures; 1 is drawn"),
        ("emoji-q emoji --reference no.npz", 1, "no.npz holds no reference pictures: "),
        ("emoji-q emoji --reference no.safetensors", 1, "no.safetensors holds no reference pictures: "),
        ("emoji-q emoji --reference other.safetensors", 1, "other.safetensors holds no reference pictures: "),
        ("emoji-q emoji --reference empty.npy", 1, "empty.npy holds no pictures"),
        (
            "emoji-q emoji --reference one.npy",
            1,
            "one.npy holds 1 picture; a Fréchet distance needs at least 2",
        ),
        ("emoji-q emoji --features broken:mean", 1, "cannot import broken for broken:mean: SyntaxError"),
        ("q pipe --seed -1", 2, "argument --seed: must be a whole number of at least 0"),
        ("q emoji --pictures 1 --steps 2", 1, "was made from another model than this float one: it has"),
    ],
)
def test_what_cannot_be_done_is_refused_in_words(ask: Ask, line: str, code: int, words: str) -> None:
    answer = ask(*line.split())
    assert words in answer[2]
    assert answer[0] == code
    assert "Traceback" not in answer[2]
