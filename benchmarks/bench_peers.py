"""Whole UNet calls beside other engines: torch eager and compiled, OpenVINO in float32 and in NNCF's int8.

    pip install openvino nncf
    python benchmarks/bench_peers.py [--model emoji] [--policy w4a8-quick] [--compiled DIR] [--batch 32] [--threads 2]
        [--seconds 60] [--without torch.compile] [--avx2]

The engines take turns of three calls on the same inputs, with the same number of threads, in one process; a time is the
median of an engine's second and third calls on the clock, so nothing else may run. Each call has a timestep that it
never had; the context is that of before, as in a denoising loop. Engines that are not installed or cannot take the model
are named with the reason. What an engine needs once (tracing, compiling) is in `seconds_before`. NNCF calibrates on
eight calls with random inputs: its speed is measured here, not its quality. With --avx2 a machine that has more computes
as one with AVX2 alone would, as far as the engines heed the environment (ours, torch, oneDNN's and MKL's do).
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from bench_unet import MODELS, draw
from machine import held_to_avx2, write
from torch import Tensor, nn

import dmqfx

Call = Callable[[Mapping[str, Tensor]], object]
Engine = tuple[tuple[str, ...], Callable[..., Call]]
"""The packages that it needs, and what makes it."""


class Positional(nn.Module):
    """A UNet that takes its inputs in the order of `draw` and gives its sample, as tracers want it."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        """One call."""
        made: Tensor = self.unet(sample, timestep, context, return_dict=False)[0]
        return made


def eager(unet: nn.Module, inputs: Mapping[str, Tensor]) -> Call:
    """As diffusers runs it."""
    module = Positional(unet)
    return lambda given: module(*given.values())


def channels_last(unet: nn.Module, inputs: Mapping[str, Tensor]) -> Call:
    """The same in the layout that convolutions prefer."""
    module = Positional(copy.deepcopy(unet).to(memory_format=torch.channels_last))  # type: ignore[call-overload]
    return lambda given: module(
        *(x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x for x in given.values())
    )


def inductor(unet: nn.Module, inputs: Mapping[str, Tensor]) -> Call:
    """torch.compile, with its defaults."""
    module = torch.compile(Positional(unet))
    return lambda given: module(*given.values())


def openvino(unet: nn.Module, inputs: Mapping[str, Tensor], *, threads: int, int8: bool = False) -> Call:
    """OpenVINO's CPU plugin: float32 arithmetic, or what NNCF quantizes."""
    import openvino as ov

    model = ov.convert_model(Positional(unet), example_input=tuple(inputs.values()))
    if int8:
        import nncf

        data = [tuple(torch.randn_like(x) if x.dim() > 1 else x for x in inputs.values()) for _ in range(8)]
        plain = [[x.numpy() for x in row] for row in data]
        model = nncf.quantize(model, nncf.Dataset(plain), model_type=nncf.ModelType.TRANSFORMER)
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = ov.Core().compile_model(model, "CPU", settings).create_infer_request()
    return lambda given: request.infer([x.numpy() for x in given.values()], share_inputs=True)


def engines(threads: int) -> dict[str, Engine]:
    """The other engines, by name."""
    return {
        "float32": (("torch",), eager),
        "float32, channels last": (("torch",), channels_last),
        "torch.compile": (("torch",), inductor),
        "OpenVINO float32": (("openvino",), partial(openvino, threads=threads)),
        "OpenVINO, NNCF int8": (("openvino", "nncf"), partial(openvino, threads=threads, int8=True)),
    }


def ready(
    wanted: Mapping[str, Engine], unet: nn.Module, inputs: Mapping[str, Tensor]
) -> tuple[dict[str, Call], dict[str, float], dict[str, str]]:
    """The engines that run, the seconds until each gave its first output, and why others do not."""
    calls: dict[str, Call] = {}
    before: dict[str, float] = {}
    missing: dict[str, str] = {}
    for name, (packages, make) in wanted.items():
        if absent := [package for package in packages if importlib.util.find_spec(package) is None]:
            missing[name] = f"{' and '.join(absent)} is not installed"
            continue
        started = time.perf_counter()
        try:
            calls[name] = make(unet, inputs)
            calls[name](inputs)
        except Exception as error:  # noqa: BLE001  # whatever another engine makes of the model is told
            calls.pop(name, None)
            missing[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            continue
        before[name] = round(time.perf_counter() - started, 1)
    return calls, before, missing


_REST = 0.05  # seconds; an engine's threads go on spinning for a while after its call
_COUNTED = 2  # calls of a turn


def in_turn(calls: Mapping[str, Call], inputs: Mapping[str, Tensor], seconds: float) -> dict[str, float]:
    """Median milliseconds of each on the clock, in turns of several calls, each at timesteps of its own.

    A turn begins when no other engine's threads wait for more work, and its first call is not counted: so caches are
    an engine's own, as in a loop.
    """
    spent: dict[str, list[float]] = {name: [] for name in calls}
    ends, numbers = time.monotonic() + seconds, itertools.count(1)
    while time.monotonic() < ends or len(spent[next(iter(calls))]) < 3:
        for name, call in calls.items():
            time.sleep(_REST)
            for k in range(1 + _COUNTED):
                given = {**inputs, "timestep": inputs["timestep"] + 2.0**-10 * next(numbers)}
                started = time.perf_counter()
                call(given)
                spent[name] += [1e3 * (time.perf_counter() - started)] if k else []
    return {name: round(statistics.median(each), 1) for name, each in spent.items()}


def options() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=list(MODELS), default="emoji", help="sd15 has random parameters")
    parser.add_argument("--policy", default="w4a8-quick")
    parser.add_argument("--compiled", help="a directory of save_pretrained, made with the policy")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=60, help="how long the engines take turns")
    parser.add_argument("--without", action="append", default=[], help="an engine to leave out")
    parser.add_argument("--avx2", action="store_true", help="as on a machine without AVX-512 and VNNI")
    return parser.parse_args()


@torch.no_grad()
def main() -> None:
    """Measure, write results/peers_MODEL_POLICY_batchN.json, or ..._avx2.json."""
    given = options()
    if given.avx2:
        held_to_avx2()
    torch.set_num_threads(given.threads)
    unet, inputs = MODELS[given.model][0](), draw(given.model, given.batch)
    q: Any = (
        dmqfx.load(given.compiled)
        if given.compiled
        else dmqfx.compile(unet, given.policy, report_rows=0, progress=False)
    )
    if q.policy is None or q.policy.name != given.policy:
        raise SystemExit(f"{given.compiled} was not made with {given.policy}")
    others = {name: each for name, each in engines(given.threads).items() if name not in given.without}
    ways = {**others, "dmqfx": (("torch",), lambda unet, inputs: eager(q, inputs))}
    calls, before, missing = ready(ways, unet, inputs)
    milliseconds = in_turn(calls, inputs, given.seconds)
    own = milliseconds["dmqfx"]
    fastest = min((name for name in milliseconds if name != "dmqfx"), key=milliseconds.__getitem__)
    result: dict[str, object] = {
        "what": f"{given.model} UNet, {given.policy}, batch {given.batch}, {given.threads} threads",
        "milliseconds_a_call": milliseconds,
        "over_dmqfx": {name: round(each / own, 2) for name, each in milliseconds.items()},
        "fastest_peer": fastest,
        "seconds_before": before,
        "not_run": missing,
        "torch's instructions": torch.backends.cpu.get_cpu_capability(),
        "versions": {name: version(name) for name in ("openvino", "nncf") if importlib.util.find_spec(name)},
    }
    held = "_avx2" if given.avx2 else ""
    write(f"peers_{given.model}_{given.policy.replace('-', '_')}_batch{given.batch}{held}", result)


if __name__ == "__main__":
    main()
