"""Whole UNet calls of the bundled emoji model: float, simulate, and cpu without and with fused operators.

    python benchmarks/bench_unet.py [--compiled DIR] [--batch 32] [--seconds 60]

The ways take turns on the same inputs in one run; a way's time is the median of its turns, in processor time of
the one thread, since other programs may run beside it. The table of operator kinds is of an interpreter's run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping

import torch
from machine import write
from torch import Tensor, fx

import dmqfx
from dmqfx import emoji
from dmqfx.graph import ops
from dmqfx.runtime.targets import Target

UNFUSED = Target("cpu without fuse", ("lower-reference", "lower-cpu"), "layers alone are native")


class _Timed(fx.Interpreter):
    """Processor time of every operator kind."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.seconds: Counter[str] = Counter()

    def run_node(self, n: fx.Node) -> object:
        started = time.thread_time()
        value = super().run_node(n)
        if n.op == "call_function":
            self.seconds[ops.name(n)] += time.thread_time() - started
        return value


def kinds(module: fx.GraphModule, inputs: Mapping[str, Tensor], times: int) -> dict[str, float]:
    """Milliseconds a call of each kind of operator, the most expensive first."""
    timed = _Timed(module)
    given = [inputs[str(n.target)] for n in module.graph.nodes if n.op == "placeholder"]
    timed.run(*given)
    timed.seconds.clear()
    for _ in range(times):
        timed.run(*given)
    return {kind: round(1e3 * total / times, 2) for kind, total in timed.seconds.most_common(14)}


def in_turn(ways: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Median milliseconds of each way."""
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for call in ways.values():
        call()
    ends = time.monotonic() + seconds
    while time.monotonic() < ends or len(spent[next(iter(ways))]) < 3:
        for name, call in ways.items():
            started = time.thread_time()
            call()
            spent[name].append(1e3 * (time.thread_time() - started))
    return {name: round(statistics.median(each), 1) for name, each in spent.items()}


@torch.no_grad()
def main() -> None:
    """Measure, write results/unet_emoji.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--compiled", help="a directory of save_pretrained; else w4a8 is compiled")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60, help="how long the ways take turns")
    options = parser.parse_args()
    torch.set_num_threads(1)
    unet = emoji.load_unet()
    made = (
        dmqfx.load(options.compiled)
        if options.compiled
        else dmqfx.compile(unet, "w4a8", report_rows=0, progress=False)
    )
    fused, unfused = made.retarget("cpu"), made.retarget(UNFUSED)
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "sample": torch.randn(options.batch, *emoji.LATENT, generator=generator),
        "timestep": torch.randint(1000, (options.batch,), generator=generator).float(),
        "encoder_hidden_states": torch.randn(options.batch, 8, 128, generator=generator),
    }
    models = {
        "float": unet,
        "simulate": made.retarget("simulate"),
        "cpu without fuse": unfused,
        "cpu": fused,
    }
    outputs = {name: model(**inputs, return_dict=False)[0] for name, model in models.items()}
    off = (outputs["cpu"] - outputs["cpu without fuse"]).norm() / outputs["cpu without fuse"].norm()
    milliseconds = in_turn(
        {name: lambda m=model: m(**inputs, return_dict=False) for name, model in models.items()},
        options.seconds,
    )
    write(
        "unet_emoji",
        {
            "what": f"bundled emoji UNet, w4a8, batch {options.batch}, one thread",
            "milliseconds_a_call": milliseconds,
            "float_over": {name: round(milliseconds["float"] / ms, 2) for name, ms in milliseconds.items()},
            "fused_from_unfused_relative_l2": float(f"{off:.2e}"),
            "operator_milliseconds_without_fuse": kinds(unfused.runner, inputs, 5),
            "operator_milliseconds": kinds(fused.runner, inputs, 5),
        },
    )


if __name__ == "__main__":
    main()
