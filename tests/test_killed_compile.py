"""`dmqfx compile` is killed, and the same command made again: it goes on, and the files are those of a whole run."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from models import one_level, randomize

from dmqfx import Calibration, compile
from dmqfx.calibration.calibration import CalibrationWarning
from dmqfx.cli import files, main
from dmqfx.errors import StoreError
from dmqfx.sweep.budget import bytes_of
from dmqfx.sweep.run import until_done

POLICY = """
schema: dmqfx.policy/1
name: short
extends: w4a6
pipeline:
  - canonicalize
  - flag-skips
  - split-skips
  - plan-sites
  - measure-sensitivity: {rows: 4}
  - fit-ranges: {rows: 256}
  - vote-shifts
  - round-weights: {method: adaround, start: gptq, iterations: 20, rows: 256}
  - learn-steps: {rows: 8, batch: 4, iterations: 10}
  - insert-qdq
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """unet/, cal/, short.yaml, and whole/, which was compiled without a kill."""
    folder = tmp_path_factory.mktemp("killed")
    unet = one_level()
    randomize(unet)
    unet.save_pretrained(folder / "unet")
    with pytest.warns(CalibrationWarning, match="random"):
        Calibration.synthesize(unet, steps=4, trajectories=2).save(folder / "cal")
    (folder / "short.yaml").write_text(POLICY)
    assert main(command(folder, "whole")) == 0
    return folder


def command(home: Path, out: str, *more: str) -> list[str]:
    given = (
        "--policy",
        home / "short.yaml",
        "--calibration",
        home / "cal",
        "--rows",
        "0",
        "--out",
        home / out,
    )
    return ["compile", *map(str, (home / "unet", *given, *more))]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Here and in what is killed: bits depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def turns(run: Path) -> int:
    return len(list(run.glob("*/turn-*")))


def iterations(run: Path) -> int:
    """How many of learn-steps are kept."""
    kept = (path.name.split("-")[1] for path in run.glob("*-learn-steps*/state-*"))
    return max((int(number) for number in kept if number.isdigit()), default=0)


def content(folder: Path) -> dict[str, str]:
    """The digest of every file that holds numbers."""
    found = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*.safetensors")
    }
    assert found
    return found


@pytest.mark.parametrize("turns_before", [(4,), pytest.param((1, 4), marks=pytest.mark.slow)], ids=str)
def test_a_compilation_that_is_killed_goes_on_and_ends_with_the_same_files(
    home: Path, capsys: pytest.CaptureFixture[str], turns_before: tuple[int, ...]
) -> None:
    chance, kills = random.Random(0), 0
    shutil.rmtree(home / "torn", ignore_errors=True)
    for wanted in turns_before:
        running = started(command(home, "torn"))
        while turns(home / "torn.run") < wanted and running.poll() is None:
            time.sleep(0.002)
        time.sleep(chance.random() * 0.05)
        kills += running.poll() is None
        running.kill()
        running.wait()
    assert kills == len(turns_before)
    assert not (home / "torn").exists()
    before = turns(home / "torn.run")
    assert before >= 4
    assert main(command(home, "torn")) == 0
    assert "tensors were finished before" in capsys.readouterr().err
    assert content(home / "torn") == content(home / "whole")
    assert not (home / "torn.run").exists()


@pytest.mark.slow
def test_a_compilation_that_is_killed_at_any_time_ends_with_the_files_of_a_whole_run(home: Path) -> None:
    """Four times: while it imports, makes its calibration, captures, learns scales, looks back, rounds, or saves."""
    scaled = POLICY.replace("plan-sites\n", f"plan-sites\n{SCALING}")
    (home / "scaled.yaml").write_text(scaled.replace("name: short", "name: scaled"))
    given = ["compile", str(home / "unet"), "--policy", str(home / "scaled.yaml"), "--rows", "0", "--out"]
    chance, began = random.Random(1), time.monotonic()
    assert started([*given, str(home / "once")]).wait() == 0
    whole, kills = time.monotonic() - began, 0
    for _ in range(4):
        running = started([*given, str(home / "often")])
        time.sleep(chance.random() * whole)
        kills += running.poll() is None
        running.kill()
        running.wait()
    assert kills >= 2  # what is kept makes each run shorter than the one before
    assert started([*given, str(home / "often")]).wait() == 0
    assert content(home / "often") == content(home / "once")
    assert not (home / "often.run").exists()


SCALING = """  - pair-layers
  - learn-scaling: {method: les, iterations: 10, rows: 256}
  - apply-scaling
"""


def started(arguments: list[str]) -> subprocess.Popen[bytes]:
    """The command in a process of its own, on one thread."""
    quiet, alone = subprocess.DEVNULL, {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "dmqfx", *arguments], stderr=quiet, stdout=quiet, env=alone
    )


OFTEN = """import sys
from dmqfx.cli import main
from dmqfx.sweep import stepsweep
stepsweep._OFTEN = 0.0
sys.exit(main(sys.argv[1:]))"""


@pytest.mark.slow
def test_learning_steps_that_is_killed_goes_on_at_the_iteration_it_was_at(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A process that keeps every iteration instead of those of 20 seconds."""
    found = list[int]()
    for wanted in (2, 6):
        running = subprocess.Popen(
            [sys.executable, "-c", OFTEN, *command(home, "shot")],
            stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        while iterations(home / "shot.run") < wanted and running.poll() is None:
            time.sleep(0.002)
        running.kill()
        assert running.wait() == -9
        found.append(iterations(home / "shot.run"))
    assert 2 <= found[0] < found[1] <= 10
    assert main(command(home, "shot")) == 0
    assert f"{found[1]} iterations were made before" in capsys.readouterr().err
    assert content(home / "shot") == content(home / "whole")


def test_a_run_folder_that_was_named_stays_and_is_read(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for out in ("one", "two"):
        assert main(command(home, out, "--run-dir", str(tmp_path / "run"))) == 0
        told = capsys.readouterr().err
        assert ("iterations were made before" in told) == (out == "two")
    assert turns(tmp_path / "run") > 4
    assert content(home / "one") == content(home / "two") == content(home / "whole")


def test_memory_and_run_dir_are_looked_at_before_anything_is_computed(home: Path, tmp_path: Path) -> None:
    unet = one_level()
    with pytest.raises(ValueError, match="a memory budget is a size such as 800MB or 6GB, not 'much'"):
        compile(unet, "w4a8-quick", memory="much")
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot keep a run in"):
        compile(
            unet, str(home / "short.yaml"), calibration=Calibration.load(home / "cal"),
            run_dir=tmp_path / "file", report_rows=0,
        )  # fmt: skip


def test_what_somebody_else_put_into_the_run_folder_stays(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = home / "shared.run"
    run.mkdir()
    (run / "diary.txt").write_text("mine")
    assert main(command(home, "shared")) == 0
    assert content(home / "shared") == content(home / "whole")
    assert [each.name for each in run.iterdir() if each.name != "lock"] == ["diary.txt"]
    assert "shared.run stays: diary.txt is not of a run" in capsys.readouterr().err


def test_two_compilations_do_not_write_the_same_model_at_once(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with until_done(home / "busy.run"):
        assert main(command(home, "busy", "--set", "default.weight.bits=3")) == 1
        assert "another process is at work in" in capsys.readouterr().err
        assert (home / "busy.run").exists()


@pytest.mark.parametrize("run", ["nested", "nested/run"])
def test_a_run_folder_that_saving_would_take_away_is_refused_at_once(
    home: Path, capsys: pytest.CaptureFixture[str], run: str
) -> None:
    assert main(command(home, "nested", "--run-dir", str(home / run))) == 1
    assert "which is replaced as a whole; say a folder elsewhere" in capsys.readouterr().err
    assert not (home / "nested").exists()


def test_a_folder_that_cannot_be_replaced_or_takes_no_files_is_refused_at_once(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "there").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "there")
    assert main(command(home, "there")) == 1
    assert "is where a file system begins, which no other folder can replace" in capsys.readouterr().err
    monkeypatch.undo()

    def full(dir: Path) -> io.BytesIO:
        if Path(dir).name == "there":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return io.BytesIO()

    monkeypatch.setattr(files.tempfile, "TemporaryFile", full)
    assert main(command(home, "there")) == 1
    assert "there takes no files (Read-only file system)" in capsys.readouterr().err


def test_a_size_of_many_digits_is_none() -> None:
    with pytest.raises(ValueError, match="a memory budget is a size such as"):
        bytes_of("9" * 310 + "GB")


def test_the_command_line_says_what_a_size_is(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        main(["compile", "emoji", "--out", str(tmp_path / "o"), "--memory", "much"])
    assert "--memory: a memory budget is a size such as 800MB or 6GB, not 'much'" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "o", ignore_errors=True)
