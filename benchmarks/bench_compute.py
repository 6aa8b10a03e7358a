"""How much arithmetic calibrating takes: a policy of ours, the published recipe, and that recipe with as much as ours.

    python benchmarks/bench_compute.py [--policy w4a6] [--seed 0]
    python benchmarks/bench_compute.py --share 0.0127 [--rates 1]

On the bundled emoji model, 16 calibration prompts. Multiply-adds of convolutions and matrix products are counted
while the passes run (torch's counter; forward and back). The published recipe is too long to run: 6,000 steps for
scales and 20,000 for codes, 32 rows each, through all planned layers once forward and twice back. The recipe's
own settings (policy dmq-paper-...) are then run with so few iterations that they take what ours takes, looks at rows
and Grams included. With --share only they are run, with that share of their iterations and learning rates --rates times
the published ones, and not counted, which is faster; what it comes to is added to the file.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Mapping

from machine import RESULTS, header, write
from torch.utils.flop_counter import FlopCounterMode

from dmqfx import emoji
from dmqfx.calibration.calibration import Calibration
from dmqfx.compiler import capture, quantize
from dmqfx.evaluation import emoji_calibration, evaluate
from dmqfx.graph import registry
from dmqfx.graph.pipeline import PassContext
from dmqfx.graph.program import Program
from dmqfx.graph.sites import quantized
from dmqfx.judging.samplers import EmojiSampler
from dmqfx.policy.policy import Policy
from dmqfx.runtime.unet import CompiledUNet
from dmqfx.seeing.inventory import macs

PUBLISHED = {"learn-scaling": 6000, "reconstruct-blocks": 20000}
PLANNING = ("canonicalize", "flag-skips", "split-skips", "plan-sites")
BATCH, FORWARD_AND_BACK = 32, 3
UNSEEN = 1000  # the noise of the pictures is of other seeds than that of the calibration


def main() -> int:
    """Measure and write results/compute_emoji.json."""
    options = (asked := parser()).parse_args()
    if options.share is None and options.rates != 1:
        asked.error("--rates is for a share of the recipe: say --share too")
    if options.share is not None and not (RESULTS / "compute_emoji.json").exists():
        asked.error("--share adds to results/compute_emoji.json, which is not there: run without it first")
    warnings.simplefilter("ignore")
    data = emoji_calibration(count=16, steps=20, seed=options.seed)
    measure = compared if options.share is None else shared
    found = measure(capture(emoji.load_unet()), data, options)
    write("compute_emoji", {"what": __doc__.splitlines()[0], **found})
    return 0


def compared(program: Program, data: Calibration, options: argparse.Namespace) -> dict[str, object]:
    """Ours, the published recipe, and the share of that which takes as much as ours."""
    seed, paper = options.seed, f"dmq-paper-{options.policy}"
    ours = run(program, data, Policy.load(options.policy), options)
    published = published_macs(program, Policy.load(paper), data)
    few, more = (counted(program, data, shortened(paper, share), seed)[1] for share in (1e-3, 2e-3))
    share = 1e-3 + 1e-3 * (ours["macs"] - few) / (more - few)
    theirs = run(program, data, shortened(paper, share), options)
    return {
        "model": "emoji",
        "seed": seed,
        options.policy: ours,
        "published": {"macs": published, "over_ours": round(published / ours["macs"], 1)},
        f"{paper}, as much arithmetic": {**theirs, "share_of_iterations": round(share, 5)},
        f"{paper}, macs by share": {"0.001": few, "0.002": more},
    }


def shared(program: Program, data: Calibration, options: argparse.Namespace) -> dict[str, object]:
    """What the file holds, and a share of the recipe beside it."""
    kept: dict[str, object] = json.loads((RESULTS / "compute_emoji.json").read_text())
    recipe = shortened(f"dmq-paper-{options.policy}", options.share, options.rates)
    started = time.perf_counter()
    _, after = quantize(program, PassContext(recipe, data, options.seed))
    found = {"seconds": round(time.perf_counter() - started, 1), **drawn(after, recipe, options)}
    name = f"{recipe.name}, share {options.share:g}, rates times {options.rates:g}, seed {options.seed}"
    return {**kept, name: {**header(), **found}}


def parser() -> argparse.ArgumentParser:
    """Options."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--policy", default="w4a6", choices=["w4a6", "w4a8"])
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--prompts", type=int, default=24, help="to draw")
    made.add_argument("--share", type=float, help="of the recipe's iterations, to run nothing else")
    made.add_argument(
        "--rates", type=float, default=1.0, help="with --share: of learning, times the published ones"
    )
    return made


def shortened(name: str, share: float, rates: float = 1.0) -> Policy:
    """The published recipe with a share of its iterations, at least one, and rates of learning so many times its own."""
    changed = []
    for step in Policy.load(name).pipeline:
        own = dict(step.options)
        if "iterations" in own:
            iterations, rate = (float(str(own[key])) for key in ("iterations", "rate"))
            changed += [
                f"pipeline.{step.name}.iterations={max(1, round(iterations * share))}",
                f"pipeline.{step.name}.rate={rate * rates:f}",
            ]
    return Policy.load(name, changed, check_step=registry.problems_with)


def counted(program: Program, data: Calibration, policy: Policy, seed: int) -> tuple[Program, int, float]:
    """The quantized program, the multiply-adds of making it, and the seconds."""
    started = time.perf_counter()
    with FlopCounterMode(display=False) as counter:
        _, after = quantize(program, PassContext(policy, data, seed))
    return after, counter.get_total_flops() // 2, time.perf_counter() - started


def run(program: Program, data: Calibration, policy: Policy, options: argparse.Namespace) -> dict[str, float]:
    """What a policy's calibration takes, and what it comes to on prompts that it has not seen."""
    after, total, seconds = counted(program, data, policy, options.seed)
    return {"macs": total, "seconds": round(seconds, 1), **drawn(after, policy, options)}


def drawn(after: Program, policy: Policy, options: argparse.Namespace) -> dict[str, float]:
    """Output and pictures of a quantized program on prompts that it has not seen."""
    unet = emoji.load_unet()
    q = CompiledUNet(after, config=unet.config, target="simulate", policy=policy)
    sampler = EmojiSampler(emoji.demo_prompts(options.prompts), 20, 3.0)
    found = evaluate(unet, q, sampler=sampler, seeds=(UNSEEN + options.seed,), rows=None)
    numbers: Mapping[str, float] = found.runs[0].numbers()
    return {key: round(numbers[key], 3) for key in ("output_db", "psnr_db")}


def published_macs(program: Program, policy: Policy, data: Calibration) -> int:
    """Of 6,000 and 20,000 steps of 32 rows through all planned layers, forward and back, feature maps whole."""
    few = tuple(step for step in policy.pipeline if step.name in PLANNING)
    steps = registry.pipeline((step.name, step.keywords()) for step in few)
    planned = steps.run(program, PassContext(policy, data))
    layers = {site.at for site in quantized(planned)}
    row = sum(macs(planned.node(at)) // planned.inputs.sizes.get("B", 1) for at in layers)
    return FORWARD_AND_BACK * BATCH * sum(PUBLISHED.values()) * row


if __name__ == "__main__":
    sys.exit(main())
