"""Whole UNet calls: float, simulate, and cpu without and with fused operators and hoisted values.

    python benchmarks/bench_unet.py [--model emoji] [--policy w4a8-quick] [--compiled DIR] [--batch 32] [--seconds 60]
        [--profile]

The ways take turns on the same inputs in one run; a way's time is the median of its turns, in processor time of
the one thread, since other programs may run beside it. What hoisting keeps comes again in "cpu" as in a loop over a
schedule and a prompt that were seen before; two more ways get timesteps, and contexts too, that never were.
Where input channels have steps of their own (vote-shifts), one more way has those layers in plain torch. --profile adds
milliseconds by kind of operator, of interpreters that take turns; the limits of a call are bench_roofline.py's.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping
from unittest.mock import patch

import torch
from machine import write
from models import sd15
from torch import Tensor, fx

import dmqfx
from dmqfx import emoji
from dmqfx.frontend.capture import capture
from dmqfx.graph import ops
from dmqfx.graph.rewrite import Refuse, Rewriter
from dmqfx.passes import lower_cpu
from dmqfx.runtime.targets import Target
from dmqfx.runtime.unet import CompiledUNet

UNHOISTED = Target(
    "cpu without hoisting", ("lower-reference", "lower-cpu", "fuse", "lower-float"), "nothing is kept"
)
UNFUSED = Target("cpu without fuse", ("lower-reference", "lower-cpu"), "layers alone are native")
MODELS = {"emoji": (emoji.load_unet, emoji.LATENT, (8, 128)), "sd15": (sd15, (4, 64, 64), (77, 768))}
SHIFTS_IN_TORCH = "cpu, shifts in torch"
_PROFILED = 5  # calls, behind a first one


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


def kinds(modules: Mapping[str, fx.GraphModule], inputs: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """Median milliseconds a call of each kind of operator, the most expensive first; the modules take turns."""
    timed = {name: _Timed(module) for name, module in modules.items()}
    found: dict[str, list[Counter[str]]] = {name: [] for name in modules}
    for _ in range(_PROFILED + 1):
        for name, each in timed.items():
            each.seconds = Counter()
            each.run(*(inputs[str(n.target)] for n in each.graph.nodes if n.op == "placeholder"))
            found[name].append(each.seconds)
    medians = {
        name: Counter({kind: statistics.median(one[kind] for one in calls[1:]) for kind in calls[0]})
        for name, calls in found.items()
    }
    return {
        name: {kind: round(1e3 * seconds, 2) for kind, seconds in each.most_common(16)}
        for name, each in medians.items()
    }


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


def with_shifts_in_torch(made: CompiledUNet) -> CompiledUNet | None:
    """The target cpu but for layers whose input channels are shifted, or None if there are none."""
    honest = lower_cpu._operands
    shifted = []

    def refusing(rw: Rewriter, root: fx.Node, *more: object, **how: object) -> object:
        if ops.args(root)["shift"] is None:
            return honest(rw, root, *more, **how)
        shifted.append(root)
        return Refuse("plain torch, to compare", root)

    with patch.object(lower_cpu, "_operands", refusing):
        found = made.retarget("cpu")
        found.runner  # noqa: B018  # lowered here
    return found if shifted else None


def lowered(made: CompiledUNet) -> dict[str, CompiledUNet]:
    """The program for each way to run it."""
    found = {name: made.retarget(name) for name in ("simulate", "cpu")}
    found |= {target.name: made.retarget(target) for target in (UNHOISTED, UNFUSED)}
    without = with_shifts_in_torch(made)
    return found if without is None else found | {SHIFTS_IN_TORCH: without}


def draw(model: str, batch: int) -> dict[str, Tensor]:
    """Inputs whose samples are at timesteps of their own."""
    _, latent, context = MODELS[model]
    generator = torch.Generator().manual_seed(0)
    return {
        "sample": torch.randn(batch, *latent, generator=generator),
        "timestep": torch.randint(1000, (batch,), generator=generator).float(),
        "encoder_hidden_states": torch.randn(batch, *context, generator=generator),
    }


def never_seen(model: CompiledUNet, inputs: Mapping[str, Tensor], *names: str) -> Callable[[], object]:
    """A call with other numbers in these inputs each time."""
    numbers = itertools.count(1)

    def call() -> object:
        step = 2.0**-10 * next(numbers)
        return model(**{k: v + step if k in names else v for k, v in inputs.items()}, return_dict=False)

    return call


def options() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=list(MODELS), default="emoji", help="sd15 has random parameters")
    parser.add_argument(
        "--policy", default="w4a8-quick", help="the policy to compile; w4a8-quick unless said otherwise"
    )
    parser.add_argument("--compiled", help="a directory of save_pretrained, made with the policy")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60, help="how long the ways take turns")
    parser.add_argument("--profile", action="store_true", help="milliseconds of each kind of operator too")
    return parser.parse_args()


@torch.no_grad()
def main() -> None:
    """Measure, write results/unet_MODEL.json; other policies than w4a8-quick and batches than 32 are in its name."""
    given = options()
    torch.set_num_threads(1)
    unet = MODELS[given.model][0]()
    made = (
        dmqfx.load(given.compiled)
        if given.compiled
        else dmqfx.compile(unet, given.policy, report_rows=0, progress=False)
    )
    if made.policy is None or made.policy.name != given.policy:
        raise SystemExit(f"{given.compiled} was not made with {given.policy}")
    inputs, ways = draw(given.model, given.batch), lowered(made)
    outputs = {name: ways[name](**inputs, return_dict=False)[0] for name in ("cpu", UNFUSED.name)}
    off = (outputs["cpu"] - outputs[UNFUSED.name]).norm() / outputs[UNFUSED.name].norm()
    calls = {
        name: lambda m=model: m(**inputs, return_dict=False)
        for name, model in {"float": unet, **ways}.items()
    }
    calls["cpu, new timesteps"] = never_seen(ways["cpu"], inputs, "timestep")
    calls["cpu, all new"] = never_seen(ways["cpu"], inputs, "timestep", "encoder_hidden_states")
    milliseconds = in_turn(calls, given.seconds)
    result: dict[str, object] = {
        "what": f"{given.model} UNet, {given.policy}, batch {given.batch}, one thread",
        "milliseconds_a_call": milliseconds,
        "float_over": {name: round(milliseconds["float"] / ms, 2) for name, ms in milliseconds.items()},
        "fused_from_unfused_relative_l2": float(f"{off:.2e}"),
        "hoisted": ways["cpu"].lowering[-1].note,
    }
    if given.profile:
        names = [name for name in ways if name not in ("simulate", "cpu")]
        programs = {"float": capture(unet).gm, **{name: ways[name].runner for name in names}}
        result["operator_milliseconds"] = kinds(programs, inputs)
    suffix = "" if given.policy == "w4a8-quick" else f"_{given.policy.replace('-', '_')}"
    suffix += "" if given.batch == 32 else f"_batch{given.batch}"
    write(f"unet_{given.model}{suffix}", result)


if __name__ == "__main__":
    main()
