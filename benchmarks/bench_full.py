"""A full calibration of SD1.5's configuration: what is told before, and what the part of it that is run takes.

    OMP_NUM_THREADS=1 python benchmarks/bench_full.py [--policy w4a6] [--minutes 20] [--budget overnight] [--calls 8]
        [--part learn-scaling] [--part rounding] [--part learn-steps]

860 M random parameters, 64 x 64 latents. Each of the two sweeps, that of `learn-scaling` and that in which ranges, shifts
and codes are found (`rounding`, behind a measured sensitivity), is stopped after so many minutes; its turns so far are
compared with what was told of each, and the rest is counted by their ratio. For `learn-steps` all weights are rounded
to nearest, and it makes --steps of its iterations, each of a batch as the policy has it. Seconds are those of the
processor, memory is the peak beside the model and the calibration data. Parts that are not asked for stay in the file.
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
from bench_estimate import Seen, peak
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
from dmqfx.sweep.budget import seconds_of
from dmqfx.sweep.progress import Progress

PARTS = ("learn-scaling", "rounding", "learn-steps")
SCALING = ("pair-layers", "learn-scaling", "apply-scaling", "absorb-scaling")


class EnoughError(Exception):
    """The time for the sweep is over."""


class Turn(NamedTuple):
    """Seconds told and taken of one tensor's readers."""

    at: str
    told: float
    took: float


class Timed(Progress):
    """Keeps what each turn was told to take and what it took; stops after `limit` seconds."""

    limit = 0.0
    turns: ClassVar[list[Turn]] = []
    told: Sequence[float] = ()

    def __init__(self, title: str, seconds: Sequence[float], *, shown: bool) -> None:
        super().__init__(title, seconds, shown=shown)
        Timed.told, self._since, self._at = list(seconds), self.elapsed, ""

    def begin(self, site: Site) -> None:
        """A turn begins, whose values were computed since the one before ended."""
        super().begin(site)
        self._at = str(site)

    def end(self, loss: float | None) -> None:
        """Note the turn.

        Raises: EnoughError when the time is over.
        """
        super().end(loss)
        Timed.turns.append(Turn(self._at, self.told[len(self.turns)], self.elapsed - self._since))
        self._since = self.elapsed
        if self.elapsed > self.limit:
            raise EnoughError


def main() -> None:
    """Measure both parts, write results/calibrate_sd15_POLICY.json."""
    options = parser().parse_args()
    torch.set_num_threads(1)
    speeds.clock, Timed.limit = time.process_time, 60 * options.minutes
    warnings.simplefilter("ignore")
    seen = Seen()
    logging.getLogger("dmqfx").addHandler(seen)
    logging.getLogger("dmqfx").setLevel(logging.INFO)
    unet = sd15()
    data = Calibration.synthesize(unet, steps=options.calls, trajectories=1)
    program = capture(unet)
    found: dict[str, object] = {"what": (__doc__ or "").partition("\n")[0]}
    path = RESULTS / f"calibrate_sd15_{options.policy}.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    found |= {part: kept[part] for part in PARTS if part in kept}
    for part in options.part or PARTS:
        measure = learn_steps if part == "learn-steps" else sweep
        found[part] = {
            **header(),
            "calibration_rows": len(data),
            **measure(program, data, options, seen, part),
        }
        write(path.stem, found)


def parser() -> argparse.ArgumentParser:
    """Options."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--policy", default="w4a6", choices=["w4a6", "w4a8"])
    made.add_argument("--minutes", type=float, default=20, help="of the processor, for the sweep")
    made.add_argument("--budget", default="overnight", help="for each part, as of `dmqfx compile`")
    made.add_argument("--calls", type=int, default=8, help="of the UNet, to calibrate on")
    made.add_argument("--part", action="append", choices=PARTS, help="may be repeated; all, unless said")
    made.add_argument("--steps", type=int, default=1, help="of learn-steps")
    return made


def sweep(
    program: Program, data: Calibration, options: argparse.Namespace, seen: Seen, part: str
) -> dict[str, object]:
    """As much of a sweep as there is time for, and the whole by what was told of it."""
    seen.found.clear()
    Timed.turns.clear()
    policy = Policy.load(options.policy, check_step=registry.problems_with)
    names = [step.name for step in policy.pipeline]
    first = names.index("learn-scaling" if part == "learn-scaling" else "fit-ranges")
    context = PassContext(policy=policy, calibration=data, budget=seconds_of(options.budget))
    skipped = SCALING if part == "rounding" else ()  # which changes no cost
    before = [step for step in policy.pipeline[:first] if step.name not in skipped]
    program = pipeline(before).run(program, replace(context, budget=None))
    with patch.object(joint, "Progress", Timed), suppress(EnoughError):
        pipeline(policy.pipeline[first:]).run(program, context)
    told, took = sum(turn.told for turn in Timed.turns), sum(turn.took for turn in Timed.turns)
    return {
        "budget": options.budget,
        "hours_told": round(sum(Timed.told) / 3600, 2),
        "turns": len(Timed.told),
        "turns_run": len(Timed.turns),
        "their_seconds_told": round(told, 1),
        "their_seconds_taken": round(took, 1),
        "took_over_estimated": round(took / told, 2),
        "hours_by_that_ratio": round(sum(Timed.told) * took / told / 3600, 2),
        "megabytes_estimated": round(seen.memory / 2**20),
        "megabytes_taken": round((peak() - seen.before) / 2**20),
        "each": [
            {"at": each.at, "told": round(each.told, 1), "took": round(each.took, 1)} for each in Timed.turns
        ],
        "before": list(seen.found),
    }


def learn_steps(
    program: Program, data: Calibration, options: argparse.Namespace, seen: Seen, part: str
) -> dict[str, object]:
    """So many iterations of learn-steps behind nearest codes, and all of them by the ratio."""
    policy = Policy.load(options.policy, ["pipeline.round-weights.method=nearest"])
    names = [step.name for step in policy.pipeline]
    before, own = policy.pipeline[: names.index(part)], policy.pipeline[names.index(part)]
    quick = [step for step in before if step.name not in ("measure-sensitivity", *SCALING)]
    context = PassContext(policy=policy, calibration=data, budget=seconds_of(options.budget))
    rounded = pipeline(quick).run(program, context)
    logging.getLogger("dmqfx").addHandler(stop := Told())
    with suppress(EnoughError):
        pipeline([own]).run(rounded, context)
    logging.getLogger("dmqfx").removeHandler(stop)
    seen.found.clear()
    few = {**own.keywords(), "iterations": options.steps}
    registry.pipeline([(own.name, few)]).run(rounded, replace(context, budget=None))
    (took,) = seen.found
    ratio = float(str(took["took"])) / float(str(took["estimated"]))
    hours = {
        "budget": options.budget,
        "hours_told": round(stop.seconds / 3600, 2),
        "hours_by_that_ratio": round(stop.seconds * ratio / 3600, 2),
    }
    return {"iterations_run": options.steps, **took, **hours}


def pipeline(steps: Sequence[Step]) -> Pipeline:
    """The passes of some steps of a policy."""
    return registry.pipeline((step.name, step.keywords()) for step in steps)


class Told(logging.Handler):
    """Takes the first estimate that is told, and stops what it is of."""

    seconds = 0.0

    def emit(self, record: logging.LogRecord) -> None:
        """Note the estimate.

        Raises: EnoughError behind it.
        """
        if "memory" in vars(record):
            self.seconds = vars(record)["seconds"]
            raise EnoughError


if __name__ == "__main__":
    main()
