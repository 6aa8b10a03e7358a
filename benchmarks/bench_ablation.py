"""Ablation on the bundled emoji model: policies x seeds, outputs and pictures against the float model.

    python benchmarks/bench_ablation.py [--policies base my.yaml ...] [--seeds 0 1 2]

Each policy and seed runs in a process of its own, so its peak memory is its own (interpreter, torch and the float
UNet included): it records calibration calls, compiles, and draws prompts that were not calibrated on. What is
finished is kept in the results file; run the same command again to go on after an interruption or a failure. A
policy whose text has changed is measured again; changed sources are only remarked on, so delete the file then.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from chart import dots
from machine import RESULTS, header, machine, peak_gigabytes, replace, today

from dmqfx import emoji
from dmqfx.compiler import compile
from dmqfx.evaluation import emoji_calibration, evaluate
from dmqfx.judging.findings import Spread
from dmqfx.judging.samplers import EmojiSampler
from dmqfx.policy.policy import Policy
from dmqfx.seeing import wording

ABLATION = Path(__file__).parent / "ablation"
ALWAYS = ("w4a8-quick", "w4a6-quick", "w4a8", "w4a6")
COLUMNS: Mapping[str, tuple[str, int]] = {
    "output_db": ("output SQNR dB", 2),
    "first_db": ("first 5", 2),
    "last_db": ("last 5", 2),
    "difference_db": ("cond - uncond", 2),
    "guided_db": ("guided", 2),
    "psnr_db": ("picture PSNR dB", 2),
    "ssim": ("SSIM", 4),
    "drift": ("drift", 4),
    "frechet_to_float": ("Fréchet", 5),
    "calibration_seconds": ("calibration s", 1),
    "peak_gigabytes": ("peak GB", 2),
}
UNSEEN = 1000  # the noise of the pictures is of other seeds than that of the calibration

Run = dict[str, Any]


def main() -> int:
    """Measure what is not measured yet; write the results file, print the table, draw the chart."""
    options = parser().parse_args()
    if options.one:
        Path(options.one).write_text(json.dumps(measure(options)))
        return 0
    path, names, failed = Path(options.out), options.policies or named(), 0
    result = {**read(path), **header(), "what": __doc__.splitlines()[0], "protocol": protocol(options)}
    wanted = [(name, seed) for name in names for seed in options.seeds if not finished(result, name, seed)]
    pool = ThreadPoolExecutor(options.jobs)
    started = {pool.submit(in_a_process, *each, options): each for each in wanted}
    try:
        for done in as_completed(started):
            if isinstance(done.exception(), subprocess.CalledProcessError):
                failed += 1
                continue
            others = [r for r in result.get("runs", []) if (r["policy"], r["seed"]) != started[done]]
            result["runs"] = [*others, done.result()]
            result["table"] = {each: summary(result, each) for each in names}
            replace(path, result)
    finally:
        pool.shutdown(cancel_futures=True)
    print(table(result, names) + f"\n{failed} runs failed" * bool(failed))
    path.with_suffix(".svg").write_text(chart(result, names), encoding="utf-8")
    return 1 if failed else 0


def parser() -> argparse.ArgumentParser:
    """Options; the defaults are the protocol."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--policies",
        nargs="+",
        help="names of benchmarks/ablation or shipped ones, or YAML files; all, unless said",
    )
    made.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    made.add_argument("--prompts", type=int, default=24, help="to draw")
    made.add_argument("--calibration-prompts", type=int, default=16)
    made.add_argument("--steps", type=int, default=20, help="of DDIM, calibrating and drawing")
    made.add_argument("--guidance", type=float, default=3.0)
    made.add_argument("--jobs", type=int, default=1, help="runs at a time; seconds are only honest for one")
    made.add_argument("--device", default="cpu", help="where the UNet compiles and draws")
    made.add_argument("--out", default=str(RESULTS / "ablation_emoji.json"))
    made.add_argument("--one", help=argparse.SUPPRESS)  # the child: where it writes its only run
    return made


def named() -> list[str]:
    """The policies beside this file, and the shipped ones that they are compared with."""
    return [*sorted(path.stem for path in ABLATION.glob("*.yaml")), *ALWAYS]


def source(name: str) -> str:
    """What to load for a name: the policy beside this file that has it, or a shipped one, or a path."""
    beside = ABLATION / f"{name}.yaml"
    return str(beside) if beside.exists() else name


def protocol(options: argparse.Namespace) -> dict[str, object]:
    """What all runs have in common."""
    return {
        "model": "emoji",
        "device": options.device,
        "scheduler": "DDIMScheduler, eta 0",
        "steps": options.steps,
        "guidance_scale": options.guidance,
        "prompts": options.prompts,
        "calibration_prompts": options.calibration_prompts,
        "calibration_guidance_scale": 3.0,
        "output_rows": "all calls of the float model while it draws",
        "noise": f"calibration: seed; pictures: seed + {UNSEEN}",
    }


def measure(options: argparse.Namespace) -> Run:
    """One policy and one seed, in this process."""
    warnings.simplefilter("ignore")
    (name,), (seed,) = options.policies, options.seeds
    unet, started = emoji.load_unet().to(options.device), time.perf_counter()
    calls = emoji_calibration(count=options.calibration_prompts, steps=options.steps, seed=seed)
    recorded = time.perf_counter()
    q = compile(unet, source(name), calibration=calls, seed=seed, report_rows=0, progress=False)
    compiled, peak = time.perf_counter(), peak_gigabytes()
    sampler = EmojiSampler(emoji.demo_prompts(options.prompts), options.steps, options.guidance)
    found = evaluate(unet, q, sampler=sampler, seeds=(UNSEEN + seed,), rows=None, reference=emoji.REFERENCE)
    return {
        "policy": name,
        "policy_sha256": digest(name),
        "seed": seed,
        "date": today(),
        "commit": commit(),
        "machine": machine(),
        "protocol": protocol(options),
        "numbers": {
            **found.runs[0].numbers(),
            "record_seconds": round(recorded - started, 1),
            "compile_seconds": round(compiled - recorded, 1),
            "calibration_seconds": round(compiled - started, 1),
            "peak_gigabytes": round(peak, 3),
        },
        "run": found.runs[0].to_data(),
    }


def in_a_process(name: str, seed: int, options: argparse.Namespace) -> Run:
    """The run of a child process."""
    print(f"{name}, seed {seed} ...", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        into = Path(folder) / "run.json"
        command = [sys.executable, __file__, "--one", str(into), "--policies", name, "--seeds", str(seed)]
        for option in ("prompts", "calibration_prompts", "steps", "guidance", "device"):
            command += [f"--{option.replace('_', '-')}", str(getattr(options, option))]
        subprocess.run(command, check=True)
        run: Run = json.loads(into.read_text())
    return run


def read(path: Path) -> dict[str, Any]:
    """The results so far."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def finished(result: Mapping[str, Any], name: str, seed: int) -> Run | None:
    """The run of a policy and a seed, if its policy and protocol are those of today."""
    for run in result.get("runs", []):
        if (run["policy"], run["seed"]) == (name, seed):
            same = run["policy_sha256"] == digest(name) and run["protocol"] == result["protocol"]
            return run if same else None
    return None


def summary(result: Mapping[str, Any], name: str) -> dict[str, dict[str, float | None]]:
    """Mean and deviation over the finished seeds of a policy."""
    rows = [run["numbers"] for run in runs_of(result, name)]
    spreads = {key: Spread.of([row[key] for row in rows]) for key in (rows[0] if rows else ())}
    return {key: {"mean": spread.mean, "deviation": spread.deviation} for key, spread in spreads.items()}


def runs_of(result: Mapping[str, Any], name: str) -> Iterator[Run]:
    """The runs of a policy that count."""
    seeds = [run["seed"] for run in result.get("runs", []) if run["policy"] == name]
    yield from (run for seed in sorted(seeds) if (run := finished(result, name, seed)) is not None)


def table(result: Mapping[str, Any], names: Sequence[str]) -> str:
    """A line for each policy: mean ± deviation over its seeds."""
    rows = [["policy", "seeds", *(words for words, _ in COLUMNS.values())]]
    for name in names:
        found = summary(result, name)
        cells = [_cell(found.get(key), decimals) for key, (_, decimals) in COLUMNS.items()]
        rows.append([Path(name).stem, str(len(list(runs_of(result, name)))), *cells])
    commits = {run["commit"] for name in names for run in runs_of(result, name)}
    remark = f"\nruns of several commits: {', '.join(sorted(commits))}" if len(commits) > 1 else ""
    return wording.columns(rows, right=range(1, len(rows[0]))) + remark


def chart(result: Mapping[str, Any], names: Sequence[str]) -> str:
    """Output SQNR beside picture PSNR, each seed a dot, as SVG."""
    panels = {}
    for key in ("output_db", "difference_db", "psnr_db"):
        panels[COLUMNS[key][0]] = [[run["numbers"][key] for run in runs_of(result, name)] for name in names]
    return dots("emoji: each seed, and the mean", [Path(name).stem for name in names], panels)


def digest(name: str) -> str:
    """The SHA-256 of a policy, with all that it extends."""
    return hashlib.sha256(str(Policy.load(source(name))).encode()).hexdigest()


def commit() -> str:
    """The commit of the sources, with a + if they differ from it."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True).stdout.strip()

    changed = git(
        "status", "--porcelain", "--untracked-files=no", "--", "../dmqfx", "../passes", "../policies"
    )
    return git("rev-parse", "--short", "HEAD") + "+" * bool(changed)


def _cell(spread: Mapping[str, float | None] | None, decimals: int) -> str:
    if spread is None:
        return ""
    deviation = "" if spread["deviation"] is None else f" ± {spread['deviation']:.{decimals}f}"
    return f"{spread['mean']:.{decimals}f}{deviation}"


if __name__ == "__main__":
    sys.exit(main())
