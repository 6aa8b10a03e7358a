"""The device follows the model, on a stand-in for a GPU: in a process of its own, which has one device more than torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("which", ["not slow", "slow"])
def test_everything_stays_on_the_device_of_the_model(which: str) -> None:
    """What on_device.py holds; every test of it runs, in two processes."""
    there = Path(__file__).with_name("on_device.py")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-m",
        which,
        str(there),
    ]
    done = subprocess.run(command, cwd=there.parents[1], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
