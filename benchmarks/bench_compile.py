"""Cost of compiling the SD1.5 configuration (860 M random parameters): seconds of every stage, peak memory, file size.

    python benchmarks/bench_compile.py [--policy w4a8-quick] [--seconds 60]

The peak is that of the whole process: interpreter, torch and the float UNet included.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from pathlib import Path

from machine import peak_gigabytes, write
from models import sd15

from dmqfx.calibration.calibration import Calibration
from dmqfx.compiler import needs_calibration, quantize
from dmqfx.frontend.capture import capture
from dmqfx.graph import registry
from dmqfx.graph.pipeline import PassContext
from dmqfx.policy.policy import Policy
from dmqfx.runtime.unet import CompiledUNet


def main() -> None:
    """Measure, write results/compile_sd15_POLICY.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policy", default="w4a8-quick")
    parser.add_argument(
        "--seconds", type=float, default=60, help="what the calibration made from the model may take"
    )
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    unet = sd15()
    float_bytes = sum(p.numel() * p.element_size() for p in unet.parameters())
    peak = {"model built": peak_gigabytes()}
    policy = Policy.load(options.policy, check_step=registry.problems_with)
    seconds: dict[str, float] = {}

    started = time.perf_counter()
    data = Calibration.synthesize(unet, seconds=options.seconds) if needs_calibration(policy) else None
    seconds["record calibration (not a pass)"] = time.perf_counter() - started
    peak["calibration recorded"] = peak_gigabytes()

    started = time.perf_counter()
    program = capture(unet)
    seconds["capture"] = time.perf_counter() - started
    _, program = quantize(program, PassContext(policy=policy, calibration=data))
    seconds.update({record.name: record.seconds for record in program.log})
    peak["passes done"] = peak_gigabytes()
    passes = time.perf_counter() - started

    compiled = CompiledUNet(program, config=unet.config, policy=policy)
    peak["lowered"] = peak_gigabytes()
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        compiled.save_pretrained(Path(folder) / "out")
        seconds["save"] = time.perf_counter() - started
        saved = sum(path.stat().st_size for path in (Path(folder) / "out").rglob("*") if path.is_file())
    write(
        f"compile_sd15_{policy.name}",
        {
            "what": "SD1.5 configuration, random parameters, " + policy.name,
            "capture_and_passes_seconds": round(passes, 1),
            "seconds": {name: round(value, 1) for name, value in seconds.items()},
            "calibration_rows": len(data) if data is not None else 0,
            "float_gigabytes": round(float_bytes / 1e9, 3),
            "peak_gigabytes": {name: round(value, 2) for name, value in peak.items()},
            "peak_over_float_weights": round(peak["passes done"] / (float_bytes / 1e9), 3),
            "saved_over_float32": round(saved / float_bytes, 4),
        },
    )


if __name__ == "__main__":
    main()
