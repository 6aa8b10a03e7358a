"""Overhead of the captured float graph over the eager UNet at batch 1: paired calls, the median of their ratios.

python benchmarks/bench_overhead.py [--pairs 60] [--sd15]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from machine import write
from models import sd15

from dmqfx import emoji
from dmqfx.frontend.capture import capture
from dmqfx.graph.pipeline import PassContext, Pipeline
from dmqfx.graph.registry import create


def main() -> None:
    """Measure, write results/overhead*.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument(
        "--sd15", action="store_true", help="the SD1.5 configuration instead of the emoji model"
    )
    options = parser.parse_args()
    unet = sd15() if options.sd15 else emoji.load_unet()
    program = Pipeline((create("canonicalize"),)).run(capture(unet), PassContext())
    inputs = program.inputs.draw(torch.Generator().manual_seed(0), B=1)
    eager = {k: v for k, v in inputs.items() if k not in ("sample", "timestep")}

    def run_eager() -> object:
        return unet(inputs["sample"], inputs["timestep"], **eager, return_dict=False)[0]

    def run_graph() -> object:
        return program(**inputs)

    with torch.no_grad():
        same = torch.equal(run_eager(), run_graph())  # type: ignore[arg-type]  # tensors
        pairs = [(_seconds(run_eager), _seconds(run_graph)) for _ in range(options.pairs)]
    ratios = sorted(graph / eager for eager, graph in pairs)
    write(
        "overhead_sd15" if options.sd15 else "overhead_emoji",
        {
            "what": "time of the captured float graph / time of eager diffusers, batch 1, paired",
            "pairs": options.pairs,
            "median_ratio": round(statistics.median(ratios), 4),
            "quartiles": [round(q, 4) for q in statistics.quantiles(ratios, n=4)],
            "eager_ms": round(1e3 * statistics.median(e for e, _ in pairs), 2),
            "bit_equal": same,
        },
    )


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
