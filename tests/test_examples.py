"""The scripts of examples/, run as their reader runs them."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SAY: dict[str, tuple[str, ...]] = {
    "quantize_a_pipeline.py": (
        "sites as asked",
        "mean difference",
        "a loaded model gives the same picture: True",
    ),
    "calibrate_from_a_pipeline.py": (
        "20 rows  4 trajectories  5 timesteps",
        "w8a8\nUNet2D",
        "w4a8-quick\nUNet2D",
    ),
    "your_own_pass.py": ("approximate-gelu alone:", "insert-qdq", "torch.Size([1, 4, 8, 8])"),
}


def test_every_script_is_run_here() -> None:
    assert set(SAY) == {file.name for file in EXAMPLES.glob("*.py")} - {"tiny_pipeline.py"}


@pytest.mark.parametrize("name", sorted(SAY))
def test_an_example_runs_and_says_what_it_found(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr("sys.argv", [name])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    out = capsys.readouterr().out
    assert [words for words in SAY[name] if words not in out] == []
