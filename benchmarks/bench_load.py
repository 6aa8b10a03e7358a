"""Loading SD1.5's configuration: seconds to the first output and resident memory, compiled and float.

    OMP_NUM_THREADS=2 python benchmarks/bench_load.py [--policy w4a8-quick] [--compiled FOLDER] [--rows 4] [--avx2]

Each model is loaded from its files in a process of its own, which imports torch and diffusers first and then computes a
batch of two (classifier-free guidance) at 64 x 64. Resident memory is what the process has more than before it loaded:
when the model is there, behind the first output with all that was freed given back, and the peak. With --compiled the
folder of a former run is taken, and made if it is not there. With --avx2 both compute as on a machine without AVX-512 and
VNNI.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from machine import held_to_avx2, write
from models import sd15

import dmqfx
from dmqfx.calibration.calibration import Calibration
from dmqfx.machine import give_back_memory
from dmqfx.policy.policy import Policy


def main() -> int:
    """Compile if need be, load both in processes, write results/load_sd15_POLICY.json, or ..._avx2.json."""
    options = parser().parse_args()
    if options.avx2:
        held_to_avx2()
    if options.child:
        print(json.dumps(loaded(options.child, Path(options.compiled))))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        home = Path(options.compiled or folder)
        policy = Policy.load(options.policy).name  # a wrong one is told before anything is made
        make(home, options)
        refuse_another(home, policy)
        found = {kind: child(kind, home) for kind in ("float", "compiled")}
    exact, small = found["float"], found["compiled"]
    result = {
        "what": (__doc__ or "").partition("\n")[0],
        "policy": policy,
        **found,
        "resident_over_float": {
            at: round(small[f"megabytes_{at}"] / exact[f"megabytes_{at}"], 3)
            for at in ("loaded", "used", "peak")
        },
    }
    write(f"load_sd15_{policy}" + "_avx2" * options.avx2, result)
    return 0


def parser() -> argparse.ArgumentParser:
    """Options."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--policy", default="w4a8-quick")
    made.add_argument("--compiled", help="a folder for both models, kept")
    made.add_argument("--rows", type=int, default=4, help="calls of the UNet to calibrate on")
    made.add_argument("--avx2", action="store_true", help="as on a machine without AVX-512 and VNNI")
    made.add_argument("--child", choices=["float", "compiled"], help=argparse.SUPPRESS)
    return made


def make(home: Path, options: argparse.Namespace) -> None:
    """The files of both models, where they are not there."""
    warnings.simplefilter("ignore")
    if not (home / "compiled").exists():
        unet = sd15()
        data = Calibration.synthesize(unet, steps=options.rows, trajectories=1)
        q = dmqfx.compile(unet, options.policy, calibration=data, report_rows=0)
        q.save_pretrained(home / "compiled")
    if not (home / "float").exists():
        sd15().save_pretrained(home / "float")


def refuse_another(home: Path, policy: str) -> None:
    """Stop where the model was made with another policy than that of this name."""
    found = Policy.load(str(home / "compiled" / "policy.yaml")).name
    if found != policy:
        raise SystemExit(
            f"{home / 'compiled'} was made with {found}, not with {policy}\n  mend: --policy {found}, or another folder"
        )


def child(kind: str, home: Path) -> dict[str, float]:
    """What a process tells that loads one of them."""
    command = [sys.executable, __file__, "--child", kind, "--compiled", str(home)]
    told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, float] = json.loads(told.splitlines()[-1])
    return found


def loaded(kind: str, home: Path) -> dict[str, float]:
    """Load and compute, in this process."""
    from diffusers import UNet2DConditionModel  # before the clock starts, for both

    generator = torch.Generator().manual_seed(0)
    sample, context = (
        torch.randn(2, 4, 64, 64, generator=generator),
        torch.randn(2, 77, 768, generator=generator),
    )
    before, started = resident(), time.perf_counter()
    if kind == "float":
        unet: torch.nn.Module = UNet2DConditionModel.from_pretrained(home / "float").eval()
    else:
        unet = dmqfx.load(home / "compiled")
    there = time.perf_counter()
    at_load = resident()
    with torch.no_grad():
        unet(sample, torch.tensor(500), encoder_hidden_states=context)
        first = time.perf_counter()
        unet(sample, torch.tensor(480), encoder_hidden_states=context)
        second = time.perf_counter()
    peak = status("VmHWM")
    return {
        "seconds_to_load": round(there - started, 2),
        "seconds_to_first_output": round(first - started, 2),
        "seconds_of_second_call": round(second - first, 2),
        "megabytes_loaded": round((at_load - before) / 2**20),
        "megabytes_used": round((resident() - before) / 2**20),
        "megabytes_peak": round((peak - before) / 2**20),
        "megabytes_of_files": round(
            sum(p.stat().st_size for p in (home / kind).rglob("*") if p.is_file()) / 2**20
        ),
    }


def resident() -> int:
    """Bytes that this process has in memory, what it freed given back."""
    gc.collect()
    give_back_memory()
    return status("VmRSS")


def status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = dict(
        line.split(":") for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    )
    return int(lines[name].split()[0]) * 1024


if __name__ == "__main__":
    sys.exit(main())
