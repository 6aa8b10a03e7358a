"""What a compilation is estimated to take beside what it takes: seconds and memory of every sweep and stream of rows.

    python benchmarks/bench_estimate.py [--case emoji] [--policy w4a6] [--budget 1min] [--processor]

The first two may be repeated; with a budget for all sweeps together, what it has room for is estimated and made.
What was measured of other cases, policies and budgets stays in the file. `--processor` counts processor seconds in
place of the clock's, for a machine that is shared; run it with one thread. The peak of memory is that of the process
above what it was when the estimate was made.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from pathlib import Path

from machine import RESULTS, write
from models import sd15_narrow

from dmqfx import emoji
from dmqfx.calibration.calibration import Calibration
from dmqfx.compiler import quantize
from dmqfx.evaluation import emoji_calibration
from dmqfx.frontend.capture import capture
from dmqfx.graph import registry
from dmqfx.graph.pipeline import PassContext
from dmqfx.graph.program import Program
from dmqfx.machine import give_back_memory
from dmqfx.numbers import speeds
from dmqfx.policy.policy import Policy
from dmqfx.sweep.budget import Budget, seconds_of

POLICIES = ("w4a6-quick", "w4a6", "w4a8")
CASES = ("emoji", "sd15-narrow")


class Seen(logging.Handler):
    """Keeps the estimates that are told, with the peak of memory from there (`before`) until the work is done."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.found: list[dict[str, object]] = []
        self.before, self.memory = 0, 0

    def emit(self, record: logging.LogRecord) -> None:
        """Note what a record says beside its words."""
        said = vars(record)
        if "memory" in said:
            self.memory = said["memory"]
            give_back_memory()  # what was freed before is no room for what comes
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is counted from here
            self.before = peak()
        elif "took" in said:
            took, estimated = said["took"], said["estimated"]
            row = {"what": said["what"], "estimated": round(estimated, 2), "took": round(took, 2)}
            row["took_over_estimated"] = round(took / estimated, 2) if estimated else None
            if self.memory:
                row["megabytes_estimated"] = round(self.memory / 2**20)
                row["megabytes_taken"] = round((peak() - self.before) / 2**20)
            self.found.append(row)
            self.memory = 0


def main() -> None:
    """Compile, and write results/estimate.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", action="append", choices=CASES)
    parser.add_argument("--policy", action="append")
    parser.add_argument("--budget", help="as of `dmqfx compile`; none, unless said")
    parser.add_argument("--processor", action="store_true")
    options = parser.parse_args()
    if options.processor:
        speeds.clock = time.process_time
    warnings.simplefilter("ignore")
    seen = Seen()
    logging.getLogger("dmqfx").addHandler(seen)
    logging.getLogger("dmqfx").setLevel(logging.INFO)
    counted = "processor seconds" if options.processor else "seconds"
    path = RESULTS / "estimate.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    for case in options.case or CASES:
        program, data = _case(case)
        for name in options.policy or POLICIES:
            seen.found.clear()
            policy = Policy.load(name, check_step=registry.problems_with)
            steps = registry.pipeline((step.name, step.keywords()) for step in policy.pipeline).steps
            budget = None if options.budget is None else Budget.over(seconds_of(options.budget), steps)
            quantize(program, PassContext(policy=policy, calibration=data, budget=budget))
            key = {"case": case, "policy": name, "budget": options.budget, "counted": counted}
            rows = [row for row in rows if any(row.get(each) != value for each, value in key.items())]
            rows += [{**key, **row} for row in seen.found]
            write("estimate", {"what": "estimated and taken", "rows": rows})


def _case(name: str) -> tuple[Program, Calibration]:
    if name == "emoji":
        return capture(emoji.load_unet()), emoji_calibration()
    unet = sd15_narrow()
    return capture(unet), Calibration.synthesize(unet, steps=8, trajectories=2)


def peak() -> int:
    """The largest resident memory since it was last reset, in bytes."""
    lines = dict(
        line.split(":") for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    )
    return int(lines["VmHWM"].split()[0]) * 1024


if __name__ == "__main__":
    main()
