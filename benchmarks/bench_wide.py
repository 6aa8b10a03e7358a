"""Local problems of `round-weights` for the layers of SD1.5: seconds and memory, measured for some shapes, counted for all.

    OMP_NUM_THREADS=1 python benchmarks/bench_wide.py [--rows 8192] [--iterations 400] [--steps 4] [--threads 1]

Weights and rows are random, rows and output metric correlated. `gptq` is one whole solution. `adaround` is its Gram and
so many iterations, of which --steps are timed in one part; all parts of a layer are of one size. Layers of other shapes
take the time of the measured one that is nearest in multiply-adds, by their ratio. Seconds are those of the processor.
Memory is the peak beside the rows themselves, the deployed ones included; each shape has a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from bench_layers import shapes
from machine import write

from dmqfx.numbers import effort
from dmqfx.numbers.adaround import Annealing, annealed
from dmqfx.numbers.gptq import handed_on
from dmqfx.numbers.parts import Wide, part_sizes
from dmqfx.numbers.quant import QuantSpec
from dmqfx.numbers.rounding import Reconstruction
from dmqfx.sweep.sensitivity import LARGEST_METRIC

Layer = tuple[int, int, int]
"""Outputs, input channels, taps."""

MEASURED: tuple[Layer, ...] = (
    (1280, 2560, 9), (1280, 1920, 9), (1280, 1280, 9), (640, 1280, 9), (640, 640, 9), (320, 640, 9),
    (320, 320, 9), (10240, 1280, 1), (1280, 5120, 1), (1280, 1280, 1), (640, 640, 1), (320, 1280, 1),
)  # fmt: skip


def main() -> None:
    """Measure each shape, write results/wide.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--iterations", type=int, default=400)
    parser.add_argument("--steps", type=int, default=4, help="of adaround that are timed")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.one:
        layer = tuple(map(int, options.one.split("x")))
        sys.stdout.write(json.dumps(measured(layer, options.rows, options.iterations, options.steps)))
        return
    found: dict[Layer, dict[str, float]] = {}
    for layer in MEASURED:
        given = [*sys.argv[1:], "--one", "x".join(map(str, layer))]
        done = subprocess.run([sys.executable, __file__, *given], stdout=subprocess.PIPE, check=True)
        found[layer] = json.loads(done.stdout)
        write("wide", {"what": (__doc__ or "").partition("\n")[0], **report(found, options)})


def measured(layer: Layer, rows: int, iterations: int, steps: int) -> dict[str, float]:
    """Seconds and megabytes of one layer."""
    before = _status("VmRSS")
    wide = drawn(layer, rows)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is counted from here
    started = time.process_time()
    codes = wide.solved(handed_on)
    wide.rounded(codes)
    gptq, peak = time.process_time() - started, _status("VmHWM")
    gram, step = learning(wide, steps)
    many = len(part_sizes(layer[1] * layer[2], layer[2]))
    return {
        "parts": many,
        "gptq_seconds": round(gptq, 2),
        "adaround_step_seconds": round(many * step, 4),
        "adaround_seconds": round(many * (gram + iterations * step), 1),
        "megabytes_gptq": round((peak - before) / 2**20),
        "megabytes_adaround": round((_status("VmHWM") - before) / 2**20),
        "megabytes_told": round(effort.nbytes(rows, layer[1] * layer[2], layer[0], layer[2]) / 2**20),
        "megabytes_of_rows": round(8 * rows * layer[1] * layer[2] / 2**20),
    }


def learning(wide: Wide, steps: int) -> tuple[float, float]:
    """Seconds of a part's Gram, and of a step of learning in it."""
    part = wide.whole if wide.is_whole else wide._part(wide.parts[0], wide._at_first)
    times = [time.process_time()]
    _ = part.gram
    times.append(time.process_time())
    start = part.nearest
    for count in (1, 1 + steps):
        started = time.process_time()
        annealed(part, start, Annealing(iterations=count))
        times.append(time.process_time() - started)
    return times[1] - times[0], max(0.0, times[3] - times[2]) / steps


def drawn(layer: Layer, rows: int) -> Wide:
    """A problem of correlated inputs of unlike energy, with a metric, where layers of that many outputs get one."""
    out, channels, taps = layer
    noise = torch.Generator().manual_seed(0)
    latent, x = torch.randn(rows, 64, generator=noise), torch.empty(rows, channels * taps)
    for part in torch.split(x, 1024, 1):
        mixing = torch.randn(64, part.shape[1], generator=noise) / 8
        part.copy_(latent @ mixing).add_(torch.randn(part.shape, generator=noise))
        part.mul_(torch.rand(part.shape[1], generator=noise) * 2)
    weight = torch.randn(out, channels, taps, generator=noise) / (channels * taps) ** 0.5
    directions = torch.randn(out, 64, generator=noise)
    metric = (directions @ directions.T / 64).double() if out <= LARGEST_METRIC else None
    spec = QuantSpec(4, "symmetric", "channel", range="mse")
    return Wide(Reconstruction(x, (x @ weight.flatten(1).T).double(), weight, spec, metric=metric), taps)


def multiplied(layer: Layer, rows: int, method: str) -> float:
    """Multiply-adds that take nearly all of the time."""
    out, channels, taps = layer
    sizes, felt = part_sizes(channels * taps, taps), out if out <= LARGEST_METRIC else 0
    if method == "gptq":
        return sum(rows * k * (k + 2 * out) + 2 * k**3 / 3 + out * k * (k + felt) / 2 for k in sizes)
    return sum(out * k * (k + felt) for k in sizes)


def report(found: dict[Layer, dict[str, float]], options: argparse.Namespace) -> dict[str, object]:
    """What was measured, and what all layers take in hours."""
    counted: Counter[Layer] = Counter()
    for shape, count in shapes().items():
        counted[shape.w[0], shape.w[1], torch.Size(shape.w[2:]).numel()] += count
    totals: dict[str, object] = {}
    for method in ("gptq", "adaround"):
        took = {}
        for layer, count in counted.items():
            own = multiplied(layer, options.rows, method)
            like = min(found, key=lambda each: abs(_log(own / multiplied(each, options.rows, method))))
            seconds = found[like][f"{method}_seconds"] * own / multiplied(like, options.rows, method)
            took[layer] = count * seconds
        total = sum(took.values())
        largest = sorted(took.items(), key=lambda each: -each[1])
        shares = {f"{_name(layer)} ({counted[layer]})": round(each / total, 3) for layer, each in largest}
        totals[method] = {"hours": round(total / 3600, 2), "shares": shares}
    layers = [{"layer": _name(layer), "count": counted[layer], **each} for layer, each in found.items()]
    settings = {"rows": options.rows, "iterations": options.iterations, "steps_timed": options.steps}
    return {**settings, "layers_in_all": sum(counted.values()), "measured": layers, "all_layers": totals}


def _log(ratio: float) -> float:
    return float(torch.tensor(ratio).log())


def _name(layer: Layer) -> str:
    return f"{layer[0]} x {layer[1] * layer[2]}" + (" (3x3)" if layer[2] == 9 else "")


def _status(key: str) -> int:
    """A line of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(dict(line.split(":") for line in lines)[key].split()[0]) * 1024


if __name__ == "__main__":
    main()
