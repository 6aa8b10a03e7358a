"""What a measurement was taken on, and where its result goes."""

from __future__ import annotations

import json
import platform
import resource
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import torch

from dmqfx.machine import processor

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, object]:
    """Processor, threads and versions."""
    return {
        "processor": processor(),
        "cores": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "diffusers", "dmqfx")},
    }


def peak_gigabytes() -> float:
    """The largest resident memory of this process so far, in 10^9 bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def write(name: str, result: Mapping[str, object]) -> Path:
    """Put a result with command, date and machine into results/NAME.json and show it."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    command = "python " + " ".join(["benchmarks/" + Path(sys.argv[0]).name, *sys.argv[1:]])
    date = datetime.now(timezone.utc).date().isoformat()
    path.write_text(
        json.dumps({"command": command, "date": date, "machine": machine(), **result}, indent=2) + "\n"
    )
    sys.stdout.write(path.read_text())
    return path
