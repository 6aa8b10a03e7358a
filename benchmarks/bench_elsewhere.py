"""Policies away from where they were calibrated: other schedulers and numbers of steps, prompts and noise unseen.

    python benchmarks/bench_elsewhere.py [--policies base w4a6 base-w4a8 w4a8] [--seeds 0] [--prompts 24]

Each policy of benchmarks/ablation, or a shipped one, is compiled for the bundled model on 16 prompts of DDIM in 20 steps,
as in bench_ablation.py. The float and the compiled model then draw the same prompts from the same noise under each of
SETTINGS. A policy and seed that are in the results file are not measured again: delete the file for that. Each run has
its command and machine; those of the file are of the last one.
"""

from __future__ import annotations

import argparse
import json
import warnings

import diffusers
from bench_ablation import UNSEEN, digest, source
from machine import RESULTS, header, write

from dmqfx import emoji
from dmqfx.compiler import compile
from dmqfx.evaluation import emoji_calibration, evaluate
from dmqfx.judging.samplers import EmojiSampler
from dmqfx.seeing import wording

SETTINGS = (
    ("DDIMScheduler", 20), ("DDIMScheduler", 10), ("DDIMScheduler", 50), ("EulerDiscreteScheduler", 20),
    ("EulerAncestralDiscreteScheduler", 20), ("DPMSolverMultistepScheduler", 15), ("UniPCMultistepScheduler", 10),
    ("PNDMScheduler", 20),
)  # fmt: skip
"""Schedulers of diffusers, configured as the model was trained, and their steps; the first is that of calibration."""


def main() -> None:
    """Measure what is not measured yet, write results/elsewhere_emoji.json and print the table."""
    options = parser().parse_args()
    warnings.simplefilter("ignore")
    path = RESULTS / "elsewhere_emoji.json"
    runs = json.loads(path.read_text())["runs"] if path.exists() else []
    known = {(run["policy"], run["policy_sha256"], run["seed"]) for run in runs}
    for name in options.policies:
        for seed in options.seeds:
            if (name, digest(name), seed) not in known:
                runs.append(measured(name, seed, options.prompts))
                write(path.stem, {"what": (__doc__ or "").partition("\n")[0], "runs": runs})
    print(table([run for run in runs if run["policy"] in options.policies]))


def parser() -> argparse.ArgumentParser:
    """Options."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--policies", nargs="+", default=["base", "w4a6", "base-w4a8", "w4a8"])
    made.add_argument("--seeds", nargs="+", type=int, default=[0])
    made.add_argument("--prompts", type=int, default=24, help="to draw")
    return made


def measured(name: str, seed: int, prompts: int) -> dict[str, object]:
    """Each of the settings, for a policy calibrated with a seed."""
    unet = emoji.load_unet()
    calls = emoji_calibration(count=16, steps=20, seed=seed)
    q = compile(unet, source(name), calibration=calls, seed=seed, report_rows=0, progress=False)
    found = []
    for scheduler, steps in SETTINGS:
        own = getattr(diffusers, scheduler).from_config(emoji.load_scheduler().config)
        sampler = EmojiSampler(emoji.demo_prompts(prompts), steps, scheduler=own)
        judged = evaluate(unet, q, sampler=sampler, seeds=(UNSEEN + seed,), rows=None)
        numbers = judged.runs[0].numbers()
        kept = {key: round(numbers[key], 3) for key in ("output_db", "guided_db", "psnr_db", "ssim")}
        found.append({"scheduler": scheduler, "steps": steps, **kept})
        print(name, seed, scheduler, steps, kept, flush=True)
    return {
        "policy": name,
        "policy_sha256": digest(name),
        "seed": seed,
        "prompts": prompts,
        **header(),
        "settings": found,
    }


def table(runs: list[dict[str, object]]) -> str:
    """Output SQNR and PSNR of the pictures, a line for each setting, the mean over seeds."""
    names = list(dict.fromkeys(str(run["policy"]) for run in runs))
    rows = [["scheduler", "steps", *(f"{name}, output / picture dB" for name in names)]]
    for k, (scheduler, steps) in enumerate(SETTINGS):
        cells = []
        for name in names:
            own = [run["settings"][k] for run in runs if run["policy"] == name]  # type: ignore[index]  # of JSON
            means = (sum(each[key] for each in own) / len(own) for key in ("output_db", "psnr_db"))
            cells.append(" / ".join(f"{mean:.1f}" for mean in means))
        rows.append([scheduler, str(steps), *cells])
    return wording.columns(rows, right=range(1, len(rows[0])))


if __name__ == "__main__":
    main()
