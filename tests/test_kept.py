"""The calibration that a compilation makes itself is kept in its run directory: another timing makes no other rows."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from models import conditional, unconditional

from dmqfx import Calibration, compile
from dmqfx.calibration import denoising
from dmqfx.calibration.calibration import CalibrationWarning
from dmqfx.cli import main
from dmqfx.errors import StoreError
from dmqfx.sweep.kept import kept

QUICK = {
    "schema": "dmqfx.policy/1",
    "name": "quick",
    "extends": "w4a8-quick",
    "pipeline": [
        "canonicalize",
        "plan-sites",
        "fit-ranges",
        {"round-weights": {"method": "nearest"}},
        "insert-qdq",
    ],
}


class Clock:
    """A machine on which whatever is timed takes so many seconds."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.now = seconds, 0.0

    def perf_counter(self) -> float:
        self.now += self.seconds
        return self.now


def rows(unet: torch.nn.Module, seed: int = 0) -> Calibration:
    return Calibration.synthesize(unet, steps=2, trajectories=1, seed=seed)


def never() -> Calibration:
    raise AssertionError("it was made again")


def same(a: Calibration, b: Calibration) -> bool:
    one, two = a.columns(), b.columns()
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


def test_a_compilation_goes_on_with_its_own_rows_on_a_machine_that_got_slower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    one_level = {
        "block_out_channels": (8,),
        "down_block_types": ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",),
    }
    unet, lengths = unconditional(**one_level), list[int]()
    caplog.set_level(logging.INFO)
    for seconds in (3.1, 4.9):
        caplog.clear()
        monkeypatch.setattr(denoising, "time", Clock(seconds))
        q = compile(unet, QUICK, run_dir=tmp_path / "run", report_rows=0, target="simulate")
        lengths.append(int(str(q.provenance["calibration"]).split()[0]))
    assert lengths == [17, 17]  # by the second clock they would be 10
    assert "tensors were finished before" in caplog.text
    assert "it is not used" not in caplog.text


def test_rows_of_another_seed_or_of_other_weights_are_made_anew_and_both_are_kept(tmp_path: Path) -> None:
    unet = unconditional()
    first = kept(tmp_path, unet, 0, lambda: rows(unet))
    other = kept(tmp_path, unet, 1, lambda: rows(unet, 1))
    assert not same(first, other)
    assert same(kept(tmp_path, unet, 0, never), first)
    assert same(kept(tmp_path, unet, 1, never), other)
    with torch.no_grad():
        unet.up_blocks[0].resnets[1].conv2.weight[-1, -1] += 0.01
    with pytest.raises(AssertionError, match="made again"):
        kept(tmp_path, unet, 0, never)


def test_damaged_rows_are_said_and_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    unet = unconditional()
    first = kept(tmp_path, unet, 0, lambda: rows(unet))
    (shard,) = tmp_path.glob("calibration-*/rows-*")
    shard.write_bytes(shard.read_bytes()[:-1])
    assert same(kept(tmp_path, unet, 0, lambda: rows(unet)), first)
    assert f"{shard} is truncated" in caplog.text
    assert "made again" in caplog.text
    assert same(kept(tmp_path, unet, 0, never), first)


def test_that_conditions_are_random_is_said_each_time(tmp_path: Path) -> None:
    unet = conditional()
    for make in (lambda: rows(unet), never):
        with pytest.warns(CalibrationWarning, match="UNet2DConditionModel on random encoder_hidden_states: "):
            kept(tmp_path, unet, 0, make)


def test_a_run_directory_that_is_a_file_is_refused_before_rows_are_made(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(StoreError, match="cannot keep a run in"):
        kept(tmp_path / "run", unconditional(), 0, never)


@pytest.mark.slow
def test_the_command_keeps_the_rows_of_the_bundled_model_and_removes_them_when_it_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dmqfx import evaluation

    def few(*, seed: int, progress: bool) -> Calibration:
        return record(count=1, steps=2, seed=seed, progress=progress)

    record = evaluation.emoji_calibration
    monkeypatch.setattr(evaluation, "emoji_calibration", few)
    command = ["compile", "emoji", "--policy", "w8a16", "--out", str(tmp_path / "out")]
    assert main([*command, "--run-dir", str(tmp_path / "run")]) == 0
    monkeypatch.setattr(evaluation, "emoji_calibration", lambda **_: never())
    assert main([*command, "--run-dir", str(tmp_path / "run")]) == 0
    monkeypatch.setattr(evaluation, "emoji_calibration", few)
    assert main(command) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]
    capsys.readouterr()


def test_rows_that_something_else_makes_of_the_model_are_others(tmp_path: Path) -> None:
    unet = unconditional()
    first = kept(tmp_path, unet, 0, lambda: rows(unet))
    other = kept(tmp_path, unet, 0, lambda: rows(unet, 1), "prompts")
    assert not same(first, other)
    assert same(kept(tmp_path, unet, 0, never), first)
    assert same(kept(tmp_path, unet, 0, never, "prompts"), other)
