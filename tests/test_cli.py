"""The command line as its user meets it: what it prints, what it refuses and how, and its exit codes."""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import pty
import re
import runpy
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from diffusers import AutoencoderKL, DDPMPipeline, DDPMScheduler, UNet2DConditionModel
from handmade import compiled as handmade
from models import one_level, randomize, unconditional

from dmqfx.calibration.calibration import CalibrationWarning
from dmqfx.cli import build_parser, main, sources, terminal
from dmqfx.cli.terminal import TARGETS
from dmqfx.errors import DmqfxError, VerifyError
from dmqfx.runtime import targets
from dmqfx.runtime.kernels.native import library

ROOT = Path(__file__).parent.parent
ATTENTION = "scaled_dot_product_attention"
LAYER = "mid_block.resnets.0.conv1/conv2d"


@dataclass(frozen=True)
class Answer:
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        """The standard output as JSON."""
        return json.loads(self.out)


Ask = Callable[..., Answer]


@pytest.fixture
def dmqfx(capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> Ask:
    """Runs a command, as the shell would, in a folder with a float UNet and a compiled one."""
    monkeypatch.chdir(folder)

    def ask(*arguments: str) -> Answer:
        capsys.readouterr()
        try:
            code = main(arguments)
        except SystemExit as stopped:  # argparse
            code = int(stopped.code or 0)
        told = capsys.readouterr()
        return Answer(code, told.out, told.err)

    return ask


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """unet/ in float, calibrated into cal/, compiled into w4a8/; prompts.txt, and a policy with a mistake."""
    home = tmp_path_factory.mktemp("cli")
    unet = one_level()
    randomize(unet)
    unet.save_pretrained(home / "unet")
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=2).save_pretrained(home / "vae")
    handmade().save_pretrained(home / "handmade")
    tiny = runpy.run_path(str(ROOT / "examples" / "tiny_pipeline.py"))["tiny_pipeline"]()
    tiny.save_pretrained(home / "pipe")
    DDPMPipeline(unconditional(), DDPMScheduler()).save_pretrained(home / "unpipe")
    (home / "list").mkdir()
    (home / "list" / "config.json").write_text("[1]")
    (home / "hollow").mkdir()
    shutil.copy(home / "unet" / "config.json", home / "hollow")
    (home / "prompts.txt").write_text("a cat\n\na dog\n")
    (home / "typo.yaml").write_text(
        "schema: dmqfx.policy/1\nname: t\nextends: w4a8-quick\ndefault:\n  weight: {bitts: 4}\n"
    )
    return home


@pytest.fixture(scope="module")
def made(folder: Path) -> dict[str, Answer]:
    """The long commands, run once: calibrate, compile with and without checks, eval, verify."""
    answers: dict[str, Answer] = {}

    def once(name: str, *arguments: str) -> None:
        out, err = (folder / f"{name}.out").open("w+"), (folder / f"{name}.err").open("w+")
        before, sys.stdout, sys.stderr, here = (sys.stdout, sys.stderr), out, err, Path.cwd()
        os.chdir(folder)
        try:
            code = main(arguments)
        finally:
            (sys.stdout, sys.stderr) = before
            os.chdir(here)
        out.close()
        err.close()
        texts = [(folder / f"{name}.{stream}").read_text() for stream in ("out", "err")]
        answers[name] = Answer(code, *texts)

    once("calibrate", "calibrate", "unet", "--steps", "3", "--trajectories", "1", "--out", "cal")
    recorded = ("--calibration", "cal", "--rows", "3")
    once("compile", "compile", "unet", "--out", "w4a8", "--min-sqnr", "90", *recorded)
    once("eval", "eval", "w4a8", "unet", "--json", "--min-psnr", "1", *recorded)
    once("verify", "verify", "unet", "--policy", "w8a16", "--json")
    return answers


# --- what is made


def test_calibrate_records_and_says_that_random_prompts_are_a_fallback(made: dict[str, Answer]) -> None:
    answer = made["calibrate"]
    assert answer.code == 0
    assert answer.out.startswith("3 rows  1 trajectories  3 timesteps")
    assert "calibrating UNet2DConditionModel on random encoder_hidden_states" in answer.err


def test_compile_saves_reports_and_fails_the_gate_that_it_misses(
    made: dict[str, Answer], folder: Path
) -> None:
    answer = made["compile"]
    assert answer.code == terminal.MISSED
    assert (folder / "w4a8" / "dmqfx.json").is_file()
    assert "48 of 48 sites as asked" in answer.out
    assert re.search(r"gate missed: the output has \d+\.\d dB SQNR, 90 dB are wanted", answer.err)


def test_a_long_command_says_what_each_pass_did_on_standard_error(made: dict[str, Answer]) -> None:
    assert re.search(r"^insert-qdq +48 applied +0 refused", made["compile"].err, re.MULTILINE)


def test_progress_bars_are_for_terminals_only(made: dict[str, Answer]) -> None:
    assert [name for name, answer in made.items() if "it/s]" in answer.err or "row/s" in answer.err] == []


def test_eval_measures_by_timestep_and_knows_when_there_are_no_pictures(made: dict[str, Answer]) -> None:
    answer = made["eval"]
    assert len(answer.data["output_db"]) == 3
    assert 5 < answer.data["mean_output_db"] < 40
    assert answer.code == terminal.MISSED
    assert "gate missed: there are no pictures, and 1 dB PSNR of them are wanted" in answer.err


def test_verify_names_every_pass_and_its_drift(made: dict[str, Answer]) -> None:
    answer = made["verify"]
    assert answer.code == 0
    drifts = {each["name"]: each["drift"] for each in answer.data["passes"]}
    assert list(drifts) == [
        "canonicalize", "plan-sites", "round-weights", "insert-qdq", "lower-simulate", "choose-forms",
        "lower-reference", "lower-cpu", "fuse", "lower-float", "hoist-invariants",
    ]  # fmt: skip
    assert drifts["canonicalize"] == 0
    assert 0 < drifts["insert-qdq"] < 0.1
    assert 0 <= drifts["lower-reference"] < 1e-5
    assert not answer.data["narrow"]


# --- what is looked at


def test_inspect_of_a_float_model_lists_layers_and_draws(dmqfx: Ask, folder: Path) -> None:
    answer = dmqfx("inspect", "unet", "--at", "mid_block.**", "--picture", "new/u.svg")
    assert answer.code == 0
    assert LAYER in answer.out
    assert "conv_in/conv2d" not in answer.out
    assert (folder / "new" / "u.svg").read_text().startswith("<svg")


def test_inspect_of_a_float_model_reads_no_weights(dmqfx: Ask) -> None:
    whole, hollow = dmqfx("inspect", "unet", "--json"), dmqfx("inspect", "hollow", "--json")
    assert hollow.code == 0, hollow.err
    assert hollow.data == whole.data


def test_inspect_of_a_hub_id_downloads_its_configuration_only(
    dmqfx: Ask, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, siblings = (
        UNet2DConditionModel.load_config(folder / "unet"),
        [SimpleNamespace(rfilename="config.json")],
    )
    monkeypatch.setattr(
        "huggingface_hub.HfApi.model_info", lambda *_, **__: SimpleNamespace(siblings=siblings)
    )
    monkeypatch.setattr("diffusers.UNet2DModel.load_config", lambda *_, **__: dict(config))
    monkeypatch.setattr("diffusers.UNet2DConditionModel.from_pretrained", pytest.fail)
    answer = dmqfx("inspect", "owner/name", "--json")
    assert answer.code == 0, answer.err
    assert answer.data == dmqfx("inspect", "hollow", "--json").data


def test_what_layers_run_as_on_this_machine_is_told_with_the_reason(
    dmqfx: Ask, made: dict[str, Answer]
) -> None:
    assert made["compile"].out
    layers = {
        each["address"]: each for each in dmqfx("inspect", "w4a8", "--target", "cpu", "--json").data["layers"]
    }
    assert layers[LAYER]["op"] == "kernel_conv2d"
    assert layers["conv_in/conv2d"]["op"] == "conv2d"
    assert {name.rpartition("/")[2]: each["op"] for name, each in layers.items()}[ATTENTION] == "kernel_sdpa"
    assert "kernel_conv2d" in dmqfx("inspect", "w4a8", "--target", "cpu").out
    assert "runs as" not in dmqfx("inspect", "w4a8").out
    assert "kernel_quantize(" in dmqfx("show", "w4a8", "--target", "cpu").out
    assert "lower-cpu" in dmqfx("why", "w4a8", LAYER, "--target", "cpu").out
    answer = dmqfx("inspect", "unet", "--target", "cpu")
    assert answer.code == terminal.FAILED
    assert "unet is not compiled, so its layers run as torch's\n  mend: dmqfx compile" in answer.err


def test_inspect_of_a_compiled_model_tells_its_bits_and_what_was_lost(
    dmqfx: Ask, made: dict[str, Answer]
) -> None:
    assert made["compile"].out
    answer = dmqfx("inspect", "w4a8")
    line = next(line for line in answer.out.splitlines() if line.startswith(LAYER))
    assert line.endswith("input 8 (default)  weight 4 (default)")
    assert "output SQNR" in answer.out
    layers = dmqfx("inspect", "w4a8", "--json").data["layers"]
    sites = next(each for each in layers if each["address"] == LAYER)["sites"]
    assert sites["weight"] == {"asked": "4 bit symmetric per channel mse", "got_bits": 4, "rule": "default"}


def test_the_picture_has_the_skips_of_a_model_whose_policy_did_not_flag_them(
    dmqfx: Ask, folder: Path
) -> None:
    assert dmqfx("compile", "unet", "--policy", "w8a16", "--rows", "0", "--out", "w8a16").code == 0
    answer = dmqfx("inspect", "w8a16", "--picture", "w8a16.svg", "--json")
    assert answer.data["picture"] == str(folder / "w8a16.svg")
    assert "arcs: long skips" in (folder / "w8a16.svg").read_text()


def test_show_prints_operations_and_as_json_their_parts(dmqfx: Ask) -> None:
    answer = dmqfx("show", "handmade", "--at", "conv_in/conv2d")
    assert answer.out.startswith("conv_in/conv2d  conv2d(input=")
    (line,) = dmqfx("show", "handmade", "--at", "conv_in/conv2d", "--json").data
    assert line["op"] == "conv2d"
    assert line["arguments"]["padding"] == "[1, 1]"


def test_looking_at_a_saved_model_says_nothing_else(dmqfx: Ask) -> None:
    assert dmqfx("show", "handmade").err == ""


def test_diff_of_a_model_with_itself_is_equal(dmqfx: Ask) -> None:
    answer = dmqfx("diff", "handmade", "handmade", "--json")
    assert answer.data["equal"] is True


def test_diff_of_float_and_compiled_is_aligned(dmqfx: Ask, made: dict[str, Answer]) -> None:
    assert made["compile"].out
    answer = dmqfx("diff", "unet", "w4a8", "--at", f"{LAYER[:-7]}/*")
    assert re.search(rf"^~ {LAYER}  .*weight: ", answer.out, re.MULTILINE)
    assert answer.out.splitlines()[-1].endswith("as before")


def test_why_tells_one_life(dmqfx: Ask, made: dict[str, Answer]) -> None:
    assert made["compile"].out
    answer = dmqfx("why", "w4a8", f"{LAYER}:weight")
    assert answer.out.startswith(f"{LAYER}\n")
    assert "asked  4 bit symmetric per channel mse, by rule 'default'" in answer.out


def test_explain_prints_bits_and_rule_of_every_site_and_compiles_nothing(dmqfx: Ask) -> None:
    answer = dmqfx("explain", "unet", "--policy", "w4a6-quick", "--set", "rules.ends.weight.bits=8", "--json")
    rows = {row.pop("site"): row for row in answer.data}
    eight, six = "8 bit symmetric per channel mse", "6 bit affine per tensor minmax x20"
    assert rows["conv_in/conv2d:weight"] == {"bits": 8, "asked": eight, "rule": "ends", "overrides": []}
    assert rows["conv_in/conv2d:input"] == {"bits": None, "asked": "float", "rule": "ends", "overrides": []}
    assert rows[f"{LAYER}:input"] == {"bits": 6, "asked": six, "rule": "default", "overrides": []}


def test_verify_of_a_saved_model_reads_its_files_and_runs_it(dmqfx: Ask, made: dict[str, Answer]) -> None:
    assert made["compile"].out
    answer = dmqfx("verify", "w4a8")
    assert answer.code == 0
    assert [line.split()[0] for line in answer.out.splitlines()] == ["files", "table", "output"]
    assert dmqfx("verify", "w4a8", "--json").data["files"] == "whole and unaltered"


def test_passes_lists_the_built_in_ones_and_tells_one(dmqfx: Ask) -> None:
    assert {"canonicalize", "insert-qdq"} <= dmqfx("passes", "--json").data.keys()
    page = dmqfx("passes", "learn-scaling").out
    assert "weighting: Literal['uniform', " in page
    assert "preserves  bitwise" in page
    assert re.search(r"^  exponent: float = 0\.5$", page, re.MULTILINE)


def test_policies_prints_a_yaml_to_start_from(dmqfx: Ask, folder: Path) -> None:
    shipped = {
        "w8a8",
        "w4a8",
        "w4a6",
        "w4a8-quick",
        "w4a6-quick",
        "dmq-paper-w4a8",
        "dmq-paper-w4a6",
        "w8a16",
        "w4a16",
    }
    assert set(dmqfx("policies", "--json").data) == shipped
    text = dmqfx("policies", "w4a8-quick.yaml").out
    assert "# Symmetric weights need no zero point" in text
    (folder / "mine.yaml").write_text(text)
    assert dmqfx("policies", "mine.yaml").code == 0


def test_env_names_what_a_bug_report_needs(dmqfx: Ask) -> None:
    found = dmqfx("env", "--json").data
    assert {"processor", "threads", "torch", "diffusers", "dmqfx", "python"} <= found.keys()
    native = library()
    assert native is not None
    assert found["kernels"].startswith(f"{native.chosen} (of scalar")
    assert found["kernel library"] == str(native.file)
    assert (
        found["layer costs"]
        == "none measured: layers are native, and so is attention over few keys (dmqfx bench)"
    )


def test_env_says_that_there_are_no_kernels_and_what_to_do(
    dmqfx: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DMQFX_KERNELS", "/nowhere.so")
    library.cache_clear()
    try:
        assert "none: the library of native kernels is not there; install a C++" in dmqfx("env").out
    finally:
        library.cache_clear()


def test_calibrate_runs_a_pipeline_on_the_prompts_of_a_file_and_is_quiet_about_it(
    dmqfx: Ask,
) -> None:
    answer = dmqfx("calibrate", "pipe", "--prompts", "prompts.txt", "--steps", "2", "--out", "pcal", "--json")
    assert (answer.code, answer.err) == (0, "")
    assert answer.data["rows"] == 2 * 2 * 2, "prompts, steps, halves of guidance"


# --- models in folders and on the hub


@pytest.mark.parametrize("file", ["{}.fp16.safetensors", "{}.fp16-00001-of-00002.safetensors"])
def test_weights_of_a_variant_are_taken_where_there_are_no_plain_ones(tmp_path: Path, file: str) -> None:
    (tmp_path / file.format("diffusion_pytorch_model")).touch()
    assert sources._variant(tmp_path) == {"variant": "fp16"}
    (tmp_path / "diffusion_pytorch_model-00001-of-00002.safetensors").touch()
    assert sources._variant(tmp_path) == {}


def test_a_folder_of_half_precision_weights_is_read(dmqfx: Ask, folder: Path) -> None:
    one_level().half().save_pretrained(folder / "half", variant="fp16")
    assert not (folder / "half" / "diffusion_pytorch_model.safetensors").exists()
    assert dmqfx("show", "half", "--at", "conv_in/*").out.startswith("conv_in/conv2d  conv2d(input=sample")


CACHED, THERE = "cached", "on the hub"


@pytest.mark.parametrize(
    ("where", "files", "asked"),
    [
        (CACHED, ["unet/config.json"], ("unet", True)),
        (CACHED, ["config.json"], ("", True)),
        (THERE, ["model_index.json", "unet/config.json"], ("unet", False)),
        (THERE, ["config.json"], ("", False)),
    ],
)
def test_a_hub_id_is_a_pipeline_or_a_unet_from_the_cache_or_the_network(
    monkeypatch: pytest.MonkeyPatch, where: str, files: list[str], asked: tuple[str, bool]
) -> None:
    loaded: list[tuple[object, ...]] = []
    info = SimpleNamespace(siblings=[SimpleNamespace(rfilename=file) for file in files])
    cached = files if where == CACHED else []
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache", lambda name, file: file if file in cached else None
    )
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: info)
    monkeypatch.setattr(sources, "_pretrained", lambda *given: loaded.append(given))
    sources.load_unet("owner/name")
    assert loaded == [("owner/name", *asked)]


# --- one wrong input for each command: what, where, how to mend


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("", 2, "usage: dmqfx"),
        ("complie unet", 2, "invalid choice: 'complie'"),
        ("demo --out new", 1, "new is a folder; say the file to write"),
        ("demo --out prompts.txt/x.png", 1, "prompts.txt/x.png cannot be written: "),
        ("demo --out /proc/x/demo.png", 1, "/proc/x/demo.png cannot be written: /proc takes no files"),
        ("demo --policy w4a9", 1, "there is no policy 'w4a9'"),
        ("demo --seed -1", 2, "argument --seed: must be a whole number of at least 0, not '-1'"),
        ("calibrate unet", 2, "the following arguments are required: --out"),
        ("calibrate unet --out prompts.txt", 1, "prompts.txt is a file; say a folder"),
        ("calibrate unet --out prompts.txt/cal", 1, "prompts.txt is a file, not a folder"),
        ("calibrate unet --out c --prompts gone.txt", 1, "gone.txt: No such file or directory"),
        (
            "calibrate unet --out c --prompts prompts.txt --trajectories 2",
            1,
            "with --prompts each prompt is run once",
        ),
        ("calibrate unpipe --out c --prompts prompts.txt", 1, "DDPMPipeline takes no prompt"),
        ("calibrate pipe --out c --prompts prompts.txt --steps 5000", 1, "pipe does not run so: "),
        ("calibrate emoji --out c --steps 5000", 1, "DDIMScheduler makes no 5000 steps"),
        ("calibrate list --out c", 1, "list is a folder whose config.json names no class"),
        ("calibrate hollow --out c", 1, "hollow has no weights (diffusion_pytorch_model.safetensors)"),
        (
            "calibrate unet --out c --prompts prompts.txt",
            1,
            "unet is not a pipeline folder (no model_index.json)",
        ),
        ("calibrate unet --out c --guidance 3", 1, "--guidance is for a pipeline: say --prompts too"),
        ("calibrate unet --out c --steps 0", 2, "argument --steps: must be a whole number of at least 1"),
        (
            "compile unet --out o --policy typo.yaml",
            1,
            "typo.yaml:5:12: unknown key 'bitts' in default.weight: did you mean 'bits'?",
        ),
        ("compile unet --out o --set default.wieght.bits=3", 1, "did you mean 'weight'?"),
        (
            "compile unet --out o --set pipeline.round-weights.method=neares",
            1,
            "method must be one of nearest",
        ),
        (
            "compile emoji --out o --set pipeline=[canonicalize]",
            1,
            "--set:1:11: the policy asks for bits (default.weight), but no step of the pipeline provides 'planned'",
        ),
        ("compile unet --out /proc/o", 1, "/proc/o cannot be written: /proc takes no files"),
        ("compile unet --out o --rows 0 --min-sqnr 20", 1, "--rows 0 measures nothing, and 20 dB SQNR"),
        ("compile unet --out o --rows 0 --set expect.sqnr_db=9", 1, "--rows 0 measures nothing, and 9 dB"),
        ("compile unet --out unet", 1, "unet holds files that dmqfx did not write"),
        ("compile unet --out o --calibration nowhere", 1, "nowhere"),
        ("compile handmade --out o", 1, "handmade is a compiled model; this command needs the float UNet"),
        ("compile vae --out o", 1, "vae is AutoencoderKL; dmqfx takes UNet2DModel"),
        ("compile nowhere --out o", 1, "there is no folder nowhere, and it is neither a hub id"),
        ("compile prompts.txt --out o", 1, "prompts.txt is a file; MODEL is a diffusers folder"),
        ("compile new --out o", 1, "new has neither config.json (a UNet) nor model_index.json"),
        ("eval handmade unet --target int8", 2, "argument --target: invalid choice: 'int8'"),
        ("eval unet unet", 1, "unet holds no dmqfx.json: it was not saved by dmqfx"),
        ("eval handmade handmade", 1, "handmade is a compiled model"),
        ("verify owner/name", 1, "there is no folder owner/name, and as a hub id it cannot be read"),
        ("verify handmade --policy w4a8", 1, "--policy and --set are for a float model"),
        ("verify unet --policy w4a9", 1, "did you mean 'w4a8'?"),
        (
            "inspect handmade --at conv_on/*",
            1,
            "'conv_on/*' fits no operation of this program; nearest: conv_in",
        ),
        ("inspect handmade --picture prompts.txt/u.svg", 1, "prompts.txt is a file, not a folder"),
        ("inspect unet --at re:(", 2, "argument --at: 're:(' is not a regular expression: missing )"),
        ("show handmade --at [", 2, "argument --at: '[' in '[' fits no address"),
        ("diff handmade nowhere", 1, "there is no folder nowhere"),
        ("diff handmade handmade --context x", 2, "argument --context"),
        ("why handmade conv_on/conv2d", 1, "nearest: conv_in/conv2d"),
        ("explain handmade", 1, "rule 'time' matches no operation"),
        ("passes rund-weights", 1, "did you mean 'round-weights'?"),
        ("policies w4a9", 1, "did you mean 'w4a8'?"),
        ("env --jason", 2, "unrecognized arguments: --jason"),
    ],
)
def test_a_wrong_input_is_answered_with_what_where_and_how_to_mend(
    dmqfx: Ask, folder: Path, line: str, code: int, words: str
) -> None:
    (folder / "new").mkdir(exist_ok=True)
    answer = dmqfx(*shlex.split(line))
    assert (answer.code, answer.out) == (code, "")
    assert words in answer.err
    assert "Traceback" not in answer.err
    assert not (folder / "o").exists()


def test_a_damaged_model_is_refused_and_verify_says_so_by_its_exit_code(dmqfx: Ask, folder: Path) -> None:
    damaged = shutil.copytree(folder / "handmade", folder / "damaged", dirs_exist_ok=True)
    with (damaged / "graph.json").open("a") as file:
        file.write(" ")
    assert dmqfx("show", "damaged").code == terminal.FAILED
    answer = dmqfx("verify", "damaged")
    assert answer.code == terminal.REFUTED
    assert "graph.json was truncated or altered" in answer.err


def test_a_model_of_a_newer_format_is_not_verified_and_the_codes_say_so(dmqfx: Ask, folder: Path) -> None:
    newer = shutil.copytree(folder / "handmade", folder / "newer", dirs_exist_ok=True) / "dmqfx.json"
    newer.write_text(newer.read_text().replace('"format_version": ', '"format_version": 9'))
    answer = dmqfx("verify", "newer")
    assert answer.code == terminal.REFUTED
    assert re.search(r"dmqfx\.json has format 9\d+, and this dmqfx reads up to \d+: update dmqfx", answer.err)
    assert "damaged or of a newer format" in terminal.EXIT_CODES[answer.code]


def test_a_model_whose_manifest_is_gone_is_still_known_as_a_compiled_one(dmqfx: Ask, folder: Path) -> None:
    shutil.copytree(folder / "handmade", folder / "partial", dirs_exist_ok=True)
    (folder / "partial" / "dmqfx.json").unlink()
    answer = dmqfx("verify", "partial")
    assert answer.code == terminal.REFUTED
    assert "dmqfx.json" in answer.err


# --- errors and results


def options(**given: object) -> argparse.Namespace:
    return argparse.Namespace(**{"json": False, "verbose": False, **given})


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (
            VerifyError("the bias is gone", step="absorb-scaling", address=LAYER),
            4,
            f"at {LAYER}: the bias is gone",
        ),
        (DmqfxError("no such thing"), 1, "dmqfx: no such thing"),
        (PermissionError(13, "Permission denied", "out"), 1, "dmqfx: out: Permission denied"),
        (OSError("no more room"), 1, "dmqfx: no more room"),
        (KeyboardInterrupt(), 130, "dmqfx: interrupted"),
    ],
)
def test_an_error_becomes_one_message_and_an_exit_code(
    capsys: pytest.CaptureFixture[str], error: BaseException, code: int, words: str
) -> None:
    def run(_: argparse.Namespace) -> int:
        raise error

    assert terminal.complain(run, options()) == code
    assert words in capsys.readouterr().err


def test_our_warnings_are_lines_and_those_of_others_are_for_verbose(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(_: argparse.Namespace) -> int:
        warnings.warn("random prompts", CalibrationWarning, stacklevel=1)
        warnings.warn("use the other thing", FutureWarning, stacklevel=1)
        return 0

    assert terminal.complain(run, options()) == 0
    assert capsys.readouterr().err == "dmqfx: random prompts\n"
    with pytest.warns(FutureWarning, match="use the other thing"):
        terminal.complain(run, options(verbose=True))


def test_json_has_only_what_json_knows(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.say(
        options(json=True), "", {"sqnr": float("inf"), "nan": float("nan"), "at": Path("x"), "n": (1,)}
    )
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {
        "sqnr": "inf", "nan": "nan", "at": "x", "n": [1]
    }  # fmt: skip


# --- help


def parsers() -> dict[str, argparse.ArgumentParser]:
    """Every command's parser."""
    (commands,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(commands.choices)


COMMANDS = sorted(parsers())


def examples_of(parser: argparse.ArgumentParser) -> Sequence[str]:
    """The command lines below a help text, without what they do."""
    listed = (parser.epilog or "").partition("examples:\n")[2].partition("\n\n")[0]
    return [re.split(r"   +|(?<=\S)  (?=\S)", line.strip())[0] for line in listed.splitlines()]


def test_there_are_these_commands() -> None:
    assert set(COMMANDS) == set(
        "demo inspect calibrate compile eval show diff why explain verify bench passes policies env".split()
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_every_example_of_a_help_text_is_a_legal_command_line(name: str) -> None:
    found = examples_of(parsers()[name])
    assert found
    for line in found:
        program, *arguments = shlex.split(line.partition(" | ")[0].partition(" > ")[0])
        assert program == "dmqfx"
        assert build_parser().parse_args(arguments).run is parsers()[name].get_default("run")


def test_the_help_of_dmqfx_lists_examples_models_and_exit_codes(dmqfx: Ask) -> None:
    answer = dmqfx("--help")
    assert answer.code == 0
    assert all(f"\n  {code}" in answer.out for code in terminal.EXIT_CODES)
    assert "MODEL is a local diffusers folder" in answer.out
    for line in examples_of(build_parser()):
        build_parser().parse_args(shlex.split(line)[1:])


def test_the_targets_of_the_command_line_are_those_there_are() -> None:
    assert ("auto", *(target.name for target in targets.TARGETS)) == TARGETS


# --- docs/cli.md

PAGE = (ROOT / "docs" / "cli.md").read_text()


@pytest.mark.parametrize("name", COMMANDS)
def test_the_page_has_a_section_with_the_options_that_the_command_has(name: str) -> None:
    section = PAGE.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
    usage = section.strip().splitlines()[0]
    common = {"--help", "--json", "--quiet", "--verbose"}
    actions = [action for action in parsers()[name]._actions if not {*action.option_strings} & common]
    assert set(re.findall(r"--[a-z-]+", usage)) == {
        option for action in actions for option in action.option_strings if option.startswith("--")
    }
    assert [
        word for word in ("MODEL", "COMPILED", "BEFORE", "AFTER", "ADDRESS", "NAME") if word in usage
    ] == sorted(
        (a.metavar or a.dest.upper() for a in actions if not a.option_strings),
        key="MODEL COMPILED BEFORE AFTER ADDRESS NAME".split().index,
    )


def test_the_page_lists_every_command_as_its_help_does() -> None:
    rows = dict(re.findall(r"^\| \[`(\w+)`\]\(#\w+\) \| (.*) \|$", PAGE, re.MULTILINE))
    assert rows == {
        name: parser.description[0].lower() + parser.description[1:-1] for name, parser in parsers().items()
    }  # type: ignore[index]  # every command has one


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("inspect", "inspect handmade"),
        ("show", "show handmade"),
        ("diff", "diff handmade handmade"),
        ("why", "why handmade conv_in/conv2d"),
        ("explain", "explain unet"),
        ("passes", "passes canonicalize"),
        ("policies", "policies w4a8"),
    ],
)
def test_the_page_lists_the_keys_of_the_json(dmqfx: Ask, name: str, line: str) -> None:
    data = dmqfx(*line.split(), "--json").data
    assert set(data[0] if isinstance(data, list) else data) == json_keys()[name]


def json_keys() -> dict[str, set[str]]:
    """What the page says of each command's JSON."""
    section = PAGE.partition("\n## JSON\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", section, re.MULTILINE)
    return {name: set(re.findall(r"`(\w+)`", words)) for name, words in rows}


def test_the_page_lists_the_keys_of_long_commands(made: dict[str, Answer]) -> None:
    assert set(json_keys()) == set(COMMANDS)
    assert set(made["eval"].data) == json_keys()["eval"]
    assert set(made["verify"].data) | {"files", "table", "output"} == json_keys()["verify"]


def test_the_page_lists_the_exit_codes() -> None:
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", PAGE, re.MULTILINE)
    assert [(int(code), meaning.replace("`", "")) for code, meaning in rows] == [
        (code, meaning.replace("`", "")) for code, meaning in terminal.EXIT_CODES.items()
    ]


# --- as a process


def process(*arguments: str, **more: Any) -> subprocess.Popen[str]:
    command = [sys.executable, *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, **pipes, text=True, preexec_fn=interruptible, **more)


def interruptible() -> None:
    """Tests that run in the background of a shell inherit that Ctrl-C is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_help_does_not_wait_for_torch() -> None:
    look = (
        "import sys, dmqfx.cli; dmqfx.cli.build_parser(); print(sys.modules.keys() & {'torch', 'diffusers'})"
    )
    assert process("-c", look).communicate()[0] == "set()\n"


def test_a_reader_that_leaves_early_is_no_error(folder: Path) -> None:
    shown = process("-m", "dmqfx", "policies", "w4a8", cwd=folder)
    assert shown.stdout is not None
    shown.stdout.close()
    assert shown.wait() == 0
    assert shown.stderr is not None
    assert shown.stderr.read() == ""


@pytest.mark.slow
def test_progress_bars_are_shown_on_a_terminal(folder: Path) -> None:
    mine, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    recording = "calibrate unet --steps 2 --trajectories 1 --out seen".split()
    command = [sys.executable, "-m", "dmqfx", *recording]
    subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=its, check=True)
    os.close(its)
    assert b"record: 100%" in os.read(mine, 100_000)


@pytest.mark.slow
def test_an_interrupted_compilation_leaves_no_more_than_its_rows_and_says_so(folder: Path) -> None:
    long = (
        "--verify",
        "--verbose",
    )  # so that it is still going when it is interrupted, however busy the machine
    going = process("-m", "dmqfx", "compile", "unet", "--out", "cut", *long, cwd=folder)
    assert going.stderr is not None
    while "captured" not in (line := going.stderr.readline()) and line:
        time.sleep(0)
    going.send_signal(signal.SIGINT)
    assert going.wait() == terminal.INTERRUPTED
    assert going.stderr.read().endswith("dmqfx: interrupted\n")
    assert [path.name for path in folder.iterdir() if "cut" in path.name] == ["cut.run"]
    assert {path.name.partition("-")[0] for path in (folder / "cut.run").iterdir()} == {"calibration", "lock"}
