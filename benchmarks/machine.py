"""What a measurement was taken on, and where its result goes."""

from __future__ import annotations

import json
import os
import platform
import resource
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import torch

from dmqfx.machine import processor

AVX2 = {
    "DMQFX_ISA": "avx2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "DNNL_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}
RESULTS = Path(__file__).parent / "results"


def held_to_avx2() -> None:
    """Begin anew with what we, torch, oneDNN and MKL read from the environment when they are loaded."""
    if not AVX2.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **AVX2})


def machine() -> dict[str, object]:
    """Processor, the instructions that torch uses of it (they decide last digits), threads and versions."""
    return {
        "processor": processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "diffusers", "dmqfx")},
    }


def peak_gigabytes() -> float:
    """The largest resident memory of this process so far, in 10^9 bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def write(name: str, result: Mapping[str, object]) -> Path:
    """Put a result with command, date and machine into results/NAME.json and show it."""
    path = RESULTS / f"{name}.json"
    replace(path, {**header(), **result})
    sys.stdout.write(path.read_text())
    return path


def header() -> dict[str, object]:
    """Command, date and machine; of folders that lie somewhere on it the name alone."""
    given = [Path(each).name if each.startswith("/") else each for each in sys.argv[1:]]
    command = "python " + " ".join(["benchmarks/" + Path(sys.argv[0]).name, *given])
    return {"command": command, "date": today(), "machine": machine()}


def today() -> str:
    """The date, in UTC."""
    return datetime.now(timezone.utc).date().isoformat()


def replace(path: Path, result: Mapping[str, object]) -> None:
    """A result file that is the old one or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(path.name + ".part")
    half.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    half.replace(path)
