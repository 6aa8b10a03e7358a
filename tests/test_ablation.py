"""The ablation benchmark: what is finished is kept, what has changed is measured again, and how it is shown."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

from dmqfx.compiler import check_pipeline
from dmqfx.policy.policy import Policy

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return import_module("bench_ablation")


@pytest.fixture
def once(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., list[tuple[str, int]]]:
    """Runs the benchmark with made-up measurements; which were made. `broken` are those that fail."""

    def run(*arguments: str, broken: tuple[tuple[str, int], ...] = ()) -> list[tuple[str, int]]:
        made = list[tuple[str, int]]()

        def measured(name: str, seed: int, options: object) -> dict[str, object]:
            made.append((name, seed))
            if (name, seed) in broken:
                raise subprocess.CalledProcessError(1, name)
            numbers = {"output_db": 20.0 + seed, "difference_db": 10.0, "psnr_db": 30.0 - seed}
            told = {"policy_sha256": bench.digest(name), "protocol": bench.protocol(options), "commit": "abc"}
            return {"policy": name, "seed": seed, **told, "numbers": numbers}

        monkeypatch.setattr(bench, "in_a_process", measured)
        out = ("--out", str(tmp_path / "r.json"))
        monkeypatch.setattr(sys, "argv", ["bench_ablation.py", *arguments, *out])
        assert bench.main() == bool(broken)
        return made

    return run


TWO = ("--policies", "w4a8", "w4a6", "--seeds", "0", "1")
ALL = [("w4a8", 0), ("w4a8", 1), ("w4a6", 0), ("w4a6", 1)]


def test_what_is_finished_is_not_measured_again(once: Callable[..., object], tmp_path: Path) -> None:
    assert once(*TWO) == ALL
    assert once(*TWO) == []
    assert once(*TWO, "2") == [("w4a8", 2), ("w4a6", 2)]
    runs = json.loads((tmp_path / "r.json").read_text())["runs"]
    assert sorted((run["policy"], run["seed"]) for run in runs) == sorted([*ALL, ("w4a8", 2), ("w4a6", 2)])


def test_a_failure_keeps_the_others_and_is_tried_again(
    once: Callable[..., object], capsys: pytest.CaptureFixture[str]
) -> None:
    assert once(*TWO, broken=(("w4a8", 1),)) == ALL
    assert "1 runs failed" in capsys.readouterr().out
    assert once(*TWO) == [("w4a8", 1)]


def test_an_interruption_keeps_what_was_finished(
    once: Callable[..., object], bench: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = bench.replace

    def interrupted_after_the_first(path: Path, result: dict[str, object]) -> None:
        keep(path, result)
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "replace", interrupted_after_the_first)
    with pytest.raises(KeyboardInterrupt):
        once(*TWO)
    monkeypatch.setattr(bench, "replace", keep)
    assert once(*TWO) == ALL[1:]


def test_another_protocol_is_another_measurement(once: Callable[..., object]) -> None:
    assert once(*TWO) == once(*TWO, "--steps", "10") == ALL


def test_a_policy_whose_text_has_changed_is_measured_again(
    once: Callable[..., object], tmp_path: Path
) -> None:
    mine = tmp_path / "mine.yaml"
    text = "schema: dmqfx.policy/1\nname: mine\nextends: w4a8-quick\ndefault:\n  input: {bits: BITS}\n"
    mine.write_text(text.replace("BITS", "8"))
    line = ("--policies", str(mine), "--seeds", "0")
    assert once(*line) == [(str(mine), 0)]
    assert once(*line) == []
    mine.write_text(text.replace("BITS", "7"))
    assert once(*line) == [(str(mine), 0)]


def test_without_names_the_policies_beside_it_are_measured_and_the_shipped_ones(bench: ModuleType) -> None:
    assert {"base", "les", "pts", "smoothquant", "w4a8", "w4a6"} < set(bench.named())
    for name in bench.named():
        check_pipeline(Policy.load(bench.source(name)))


def test_the_table_has_mean_and_deviation_over_seeds(
    once: Callable[..., object], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    once(*TWO)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:5] == ["w4a8", "2", "20.50", "±", "0.71"]
    found = json.loads((tmp_path / "r.json").read_text())["table"]["w4a6"]
    assert found["psnr_db"] == {"mean": 29.5, "deviation": pytest.approx(0.5**0.5)}


def test_the_chart_has_a_dot_for_each_seed_at_its_value(once: Callable[..., object], tmp_path: Path) -> None:
    once(*TWO)
    root = ElementTree.fromstring((tmp_path / "r.svg").read_text())
    circles = [c for c in root.iter("{http://www.w3.org/2000/svg}circle") if c.get("r") == "3"]
    assert len(circles) == 3 * 4
    first, second = (float(circle.get("cx", "")) for circle in circles[:2])
    assert second - first == pytest.approx(300), "20 and 21 dB are the ends of a panel 300 wide"
    words = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"w4a8", "w4a6", "output SQNR dB", "picture PSNR dB"} <= set(words)


@pytest.mark.slow
def test_a_real_run_measures_in_a_process_of_its_own(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "bench_ablation.py"), "--policies", "w8a16", "--seeds", "3"]
    small = [
        "--prompts",
        "2",
        "--calibration-prompts",
        "1",
        "--steps",
        "2",
        "--out",
        str(tmp_path / "r.json"),
    ]
    subprocess.run([*command, *small], check=True)
    (run,) = json.loads((tmp_path / "r.json").read_text())["runs"]
    assert (run["seed"], run["run"]["seed"], len(run["run"]["psnr_db"])) == (3, 1003, 2)
    assert 30 < run["numbers"]["output_db"] < 60
    assert run["numbers"]["peak_gigabytes"] > 0.2
    assert run["numbers"]["calibration_seconds"] > 0
