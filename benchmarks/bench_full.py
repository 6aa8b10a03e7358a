"""A full calibration of SD1.5's configuration: what is told of the whole, and what layers of many shapes take of it.

    OMP_NUM_THREADS=1 python benchmarks/bench_full.py [--policy w4a6] [--rows 320] [--budget overnight] [--calls 8]
        [--part learn-scaling] [--part rounding] [--part learn-steps] [--steps 1]

860 M random parameters, 64 x 64 latents. The whole is told for --rows calibration rows, without a budget of time and with
one for all passes together. What is told of the two sweeps, that of `learn-scaling` and that in which ranges, shifts and
codes are found (`rounding`, behind a sensitivity that is measured of all layers on one row), is held against what they
take where all layers but LAYERS stay in float, on the rows of --calls guided calls and with as many iterations as the
budget leaves; the whole is counted by that ratio. For `learn-steps` weights are rounded to nearest, ranges are
extremes, and it makes --steps of its iterations, each of a batch as the policy has it. Seconds are those of the processor,
memory is the peak beside the model and the calibration data. Parts that are not asked for stay in the file.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import ClassVar, NamedTuple
from unittest.mock import patch

import torch
from bench_estimate import Seen
from machine import RESULTS, header, write
from models import sd15

from dmqfx.calibration.calibration import Calibration
from dmqfx.frontend.capture import capture
from dmqfx.graph import registry
from dmqfx.graph.address import Site
from dmqfx.graph.pipeline import PassContext, Pipeline
from dmqfx.graph.program import Program
from dmqfx.numbers import speeds
from dmqfx.policy.policy import Policy, Step
from dmqfx.sweep import joint
from dmqfx.sweep.budget import Budget, scaled, seconds_of
from dmqfx.sweep.progress import Progress

PARTS = ("learn-scaling", "rounding", "learn-steps")
SCALING = ("pair-layers", "learn-scaling", "apply-scaling", "absorb-scaling")
BLOCK = "attentions.0.transformer_blocks.0"
LAYERS = (
    "down_blocks.0.resnets.0.conv1/*", f"down_blocks.0.{BLOCK}.attn1.to_q/*", f"down_blocks.0.{BLOCK}.ff.net.0.proj/*",
    f"down_blocks.0.{BLOCK}.attn2.to_k/*", "down_blocks.1.resnets.0.conv1/*", f"down_blocks.1.{BLOCK}.ff.net.2/*",
    "down_blocks.2.resnets.1.conv2/*", "mid_block.resnets.0.conv1/*", "up_blocks.0.resnets.0.conv1/*",
    "up_blocks.1.resnets.2.conv1/*", "up_blocks.2.resnets.0.conv1/*", "up_blocks.3.resnets.0.conv1/*",
    "up_blocks.3.resnets.0.conv_shortcut/*",
)  # fmt: skip
"""Convolutions and linears at every size of the images, 320 to 2560 channels; skips have two arms."""
LITTLE = "pipeline.measure-sensitivity.rows=1"
"""The metrics that it leaves cost as much whatever rows they are from."""


class EnoughError(Exception):
    """What was asked is known."""


class Turn(NamedTuple):
    """Seconds told and taken of one tensor's readers."""

    at: str
    told: float
    took: float


class Timed(Progress):
    """Keeps what each turn was told to take and what it took."""

    turns: ClassVar[list[Turn]] = []

    def __init__(self, title: str, seconds: Sequence[float], *, shown: bool) -> None:
        super().__init__(title, seconds, shown=shown)
        self._told, self._since, self._at = list(seconds), self.elapsed, ""

    def begin(self, site: Site) -> None:
        """A turn begins, whose values were computed since the one before ended."""
        super().begin(site)
        self._at = str(site)

    def end(self, loss: float | None) -> None:
        """Note the turn."""
        super().end(loss)
        Timed.turns.append(Turn(self._at, self._told[len(self.turns)], self.elapsed - self._since))
        self._since = self.elapsed


class Told(logging.Handler):
    """Takes the first estimate that is told, and stops what it is of."""

    seconds, memory, factor = 0.0, 0, 1.0

    def emit(self, record: logging.LogRecord) -> None:
        """Note the estimate.

        Raises: EnoughError behind it.
        """
        if "memory" in (said := vars(record)):
            self.seconds, self.memory, self.factor = said["seconds"], said["memory"], said["factor"]
            raise EnoughError


def main() -> None:
    """Measure the parts, write results/calibrate_sd15_POLICY.json."""
    options = parser().parse_args()
    torch.set_num_threads(1)
    speeds.clock = time.process_time
    warnings.simplefilter("ignore")
    seen = Seen()
    logging.getLogger("dmqfx").addHandler(seen)
    logging.getLogger("dmqfx").setLevel(logging.INFO)
    unet = sd15()
    data = Calibration.synthesize(unet, steps=options.calls, trajectories=2)
    program = capture(unet)
    found: dict[str, object] = {"what": (__doc__ or "").partition("\n")[0]}
    path = RESULTS / f"calibrate_sd15_{options.policy}.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    found |= {part: kept[part] for part in PARTS if part in kept}
    for part in options.part or PARTS:
        measure = learn_steps if part == "learn-steps" else sweep
        measured = measure(program, data, options, seen, part)
        found[part] = {**header(), "calibration_rows_run": len(data), **measured}
        write(path.stem, found)


def parser() -> argparse.ArgumentParser:
    """Options."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--policy", default="w4a6", choices=["w4a6", "w4a8"])
    made.add_argument("--rows", type=int, default=320, help="of calibration, that the whole is told for")
    made.add_argument("--budget", default="overnight", help="of the whole, as of `dmqfx compile`")
    made.add_argument(
        "--calls", type=int, default=8, help="of the UNet, two rows each, that the parts run on"
    )
    made.add_argument("--part", action="append", choices=PARTS, help="may be repeated; all, unless said")
    made.add_argument("--steps", type=int, default=1, help="of learn-steps")
    return made


def sweep(
    program: Program, data: Calibration, options: argparse.Namespace, seen: Seen, part: str
) -> dict[str, object]:
    """The sweep over some layers, and that over all by what is told of both."""
    first = "learn-scaling" if part == "learn-scaling" else "fit-ranges"
    skipped = SCALING if part == "rounding" else ()  # which changes no cost
    whole = Policy.load(options.policy, [LITTLE], check_step=registry.problems_with)
    seen.found.clear()
    ready, own = before(program, whole, data, first, skipped)
    earlier = list(seen.found)
    told = asked(ready, own, data, options)
    some = only(options.policy)
    ready, own = before(program, some, data, first, skipped)
    shorter = [scaled(step, told["budget"].factor) for step in own.steps]
    seen.found.clear()
    Timed.turns.clear()
    with patch.object(joint, "Progress", Timed):
        Pipeline(tuple(shorter)).run(ready, PassContext(policy=some, calibration=data))
    (took,) = seen.found
    return {
        **{f"{name}_{key}": value for name, each in told.items() for key, value in hours(each, took).items()},
        "budget": options.budget,
        "rows_told": options.rows,
        "options_times": told["budget"].factor,
        "layers_run": len(LAYERS),
        "before_it_over_all_layers": earlier,
        **took,
        "each": [
            {"at": each.at, "told": round(each.told, 1), "took": round(each.took, 1)} for each in Timed.turns
        ],
    }


def before(
    program: Program, policy: Policy, data: Calibration, first: str, skipped: Sequence[str]
) -> tuple[Program, Pipeline]:
    """The program as the sweep that begins with a pass gets it, and that sweep's passes."""
    names = [step.name for step in policy.pipeline]
    start = names.index(first)
    end = start + (1 if first == "learn-scaling" else 3)
    steps = [step for step in policy.pipeline[:start] if step.name not in skipped]
    context = PassContext(policy=policy, calibration=data)
    return pipeline(steps).run(program, context), pipeline(policy.pipeline[start:end])


def only(name: str) -> Policy:
    """A policy for LAYERS alone: what it says of all sites, but only for them."""
    default = Policy.load(name).default
    bits = {"weight": {"bits": default.weight.bits}, "input": {"bits": default.input.bits}}
    rules = [{"name": "rest", "at": "**", "keep": "float"}, {"name": "some", "at": list(LAYERS), **bits}]
    return Policy.load(
        {"schema": "dmqfx.policy/1", "name": "some", "extends": name, "rules": rules},
        [LITTLE],
        check_step=registry.problems_with,
    )


def asked(ready: Program, steps: Pipeline, data: Calibration, options: argparse.Namespace) -> dict[str, Told]:
    """What is told of a sweep over all layers and --rows calibration rows, without a budget and with its share of one."""
    whole = Policy.load(options.policy, check_step=registry.problems_with)
    full = data.merge(*[data] * (-(-options.rows // len(data)) - 1)).select(
        options.rows, torch.Generator().manual_seed(0)
    )
    share = Budget.over(seconds_of(options.budget), pipeline(whole.pipeline).steps)
    found = {}
    for name, budget in (("whole", None), ("budget", share)):
        logging.getLogger("dmqfx").addHandler(told := Told())
        with suppress(EnoughError):
            steps.run(ready, PassContext(policy=whole, calibration=full, budget=budget))
        logging.getLogger("dmqfx").removeHandler(told)
        found[name] = told
    return found


def hours(told: Told, took: dict[str, object]) -> dict[str, float]:
    """What was told of a whole, and what it comes to by what a part of it took."""
    ratio = float(str(took["took"])) / float(str(took["estimated"]))
    return {
        "hours_told": round(told.seconds / 3600, 2),
        "hours_by_ratio": round(told.seconds * ratio / 3600, 2),
        "megabytes_told": round(told.memory / 2**20),
    }


def learn_steps(
    program: Program, data: Calibration, options: argparse.Namespace, seen: Seen, part: str
) -> dict[str, object]:
    """So many iterations of learn-steps behind nearest codes, and all of them by the ratio."""
    policy = Policy.load(
        options.policy, ["pipeline.round-weights.method=nearest", "default.input.range=minmax"]
    )
    names = [step.name for step in policy.pipeline]
    own = policy.pipeline[names.index(part)]
    left = [
        step
        for step in policy.pipeline[: names.index(part)]
        if step.name not in ("measure-sensitivity", *SCALING)
    ]
    context = PassContext(policy=policy, calibration=data)
    rounded = pipeline(left).run(program, context)
    told = asked(rounded, pipeline([own]), data, options)
    seen.found.clear()
    few = {**own.keywords(), "iterations": options.steps}
    registry.pipeline([(own.name, few)]).run(rounded, replace(context, budget=None))
    (took,) = seen.found
    found = {
        f"{name}_{key}": value for name, each in told.items() for key, value in hours(each, took).items()
    }
    return {
        **found, "budget": options.budget, "rows_told": options.rows, "options_times": told["budget"].factor,
        "iterations_run": options.steps, **took,
    }  # fmt: skip


def pipeline(steps: Sequence[Step]) -> Pipeline:
    """The passes of some steps of a policy."""
    return registry.pipeline((step.name, step.keywords()) for step in steps)


if __name__ == "__main__":
    main()
