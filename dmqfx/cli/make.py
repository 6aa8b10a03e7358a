"""Commands that make something: demo, calibrate, compile."""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dmqfx.cli import files, sources, terminal
from dmqfx.cli.terminal import Commands, bars, command, finite, number, whole

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from dmqfx.calibration.calibration import Calibration
    from dmqfx.policy.policy import Policy
    from dmqfx.runtime.unet import CompiledUNet


def add_commands(commands: Commands[argparse.ArgumentParser]) -> None:
    """Declare the commands of this file."""
    _demo(commands)
    _calibrate(commands)
    _compile(commands)


def _demo(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = command(
        commands,
        "demo",
        demo,
        "compile the bundled emoji model and draw float beside quantized",
        (
            ("dmqfx demo", "w4a8-quick and w4a6, into demo.png"),
            ("dmqfx demo --policy w8a8 --policy my.yaml --out mine.png", "other policies"),
        ),
    )
    parser.add_argument("--out", default="demo.png", metavar="PNG", help="the picture [demo.png]")
    parser.add_argument("--policy", action="append", default=[], help="may be repeated [w4a8-quick and w4a6]")
    parser.add_argument("--seed", type=whole(0), default=0, help="of noise and calibration [0]")


def demo(options: argparse.Namespace) -> int:
    """dmqfx demo."""
    from dmqfx import demo as show

    out = files.to_be_file(options.out)
    rows = show.run(options.policy or ["w4a8-quick", "w4a6"], out, seed=options.seed, progress=bars())
    text = "\n\n".join([show.table(rows), *show.remarks(rows), f"picture: {out.resolve()}"])
    terminal.say(options, text, {"picture": str(out.resolve()), "rows": [row.to_data() for row in rows]})
    return terminal.OK


def _calibrate(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = command(
        commands,
        "calibrate",
        calibrate,
        "record the calls that a UNet receives, once, for every policy to use",
        (
            ("dmqfx calibrate emoji --out cal/", "guided trajectories of the bundled model"),
            ("dmqfx calibrate sd15/ --prompts prompts.txt --out cal/", "a whole pipeline, as it is used"),
            (
                "dmqfx calibrate sd15/ --prompts p.txt --guidance 5 --steps 30 --out cal/",
                "with other settings",
            ),
            ("dmqfx calibrate unet/ --out cal/", "a UNet alone: trajectories from noise"),
        ),
    )
    terminal.add_model(parser, compiled=False)
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where to write")
    parser.add_argument(
        "--prompts", metavar="FILE", help="one prompt a line; MODEL is then a pipeline folder, which is run"
    )
    parser.add_argument(
        "--steps", type=whole(1), help="of each trajectory [a pipeline and emoji: 20; else by measured cost]"
    )
    parser.add_argument(
        "--trajectories", type=whole(1), help="how many, without --prompts [emoji: 8; else by measured cost]"
    )
    parser.add_argument(
        "--guidance", type=finite, help="scale of classifier-free guidance [the pipeline's own]"
    )
    parser.add_argument("--seed", type=whole(0), default=0, help="of the noise [0]")


def calibrate(options: argparse.Namespace) -> int:
    """dmqfx calibrate."""
    from dmqfx.errors import DmqfxError

    out = files.to_be_folder(options.out)
    if options.guidance is not None and not options.prompts:
        raise DmqfxError("--guidance is for a pipeline: say --prompts too")
    if options.trajectories is not None and options.prompts:
        raise DmqfxError("--trajectories is for a model alone: with --prompts each prompt is run once")
    recorded = _recorded(options)
    recorded.save(out)
    about = {
        "folder": str(out.resolve()),
        "rows": len(recorded),
        "timesteps": sorted(set(recorded.timesteps().tolist())),
    }
    terminal.say(options, f"{recorded.describe()}\nwritten to {out}", about)
    return terminal.OK


def _recorded(options: argparse.Namespace) -> Calibration:
    from dmqfx.calibration.calibration import Calibration
    from dmqfx.evaluation import emoji_calibration

    if options.prompts:
        prompts = files.read_prompts(options.prompts)
        return _watched(sources.load_pipeline(options.model), prompts, options)
    if sources.is_emoji(options.model):
        return emoji_calibration(
            count=options.trajectories, steps=options.steps or 20, seed=options.seed, progress=bars()
        )
    return Calibration.synthesize(
        sources.load_unet(options.model),
        steps=options.steps,
        trajectories=options.trajectories,
        seed=options.seed,
        progress=bars(),
    )


def _watched(pipe: DiffusionPipeline, prompts: list[str], options: argparse.Namespace) -> Calibration:
    """What a pipeline's UNet receives. What the pipeline itself refuses to do is no bug of ours."""
    from dmqfx.calibration.calibration import Calibration
    from dmqfx.errors import DmqfxError

    try:
        return Calibration.record(
            pipe,
            prompts=prompts,
            steps=options.steps or 20,
            guidance_scale=options.guidance,
            seed=options.seed,
            progress=bars(),
        )
    except (TypeError, ValueError) as error:
        raise DmqfxError(f"{type(pipe).__name__} in {options.model} does not run so: {error}") from error


def _compile(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = command(
        commands,
        "compile",
        compile_,
        "quantize a UNet by a policy and save it",
        (
            ("dmqfx compile emoji --policy w4a6 --out emoji-w4a6/", ""),
            ("dmqfx compile unet/ --calibration cal/ --out out/", "w4a8-quick, on what was recorded"),
            (
                "dmqfx compile unet/ --policy my.yaml --set default.weight.bits=3 --out out/",
                "one setting changed",
            ),
            (
                "dmqfx compile unet/ --verify --min-sqnr 18 --out out/",
                "every pass checked; exit 3 below 18 dB",
            ),
        ),
    )
    terminal.add_model(parser, compiled=False)
    terminal.add_policy(parser)
    parser.add_argument("--out", required=True, metavar="FOLDER", help="a compiled model there is replaced")
    parser.add_argument(
        "--calibration", metavar="FOLDER", help="of `dmqfx calibrate` [made from the model itself]"
    )
    parser.add_argument("--verify", action="store_true", help="check every pass as it runs")
    parser.add_argument("--seed", type=whole(0), default=0, help="of everything random [0]")
    _add_limits(parser)
    parser.add_argument(
        "--rows", type=whole(0), default=16, help="calibration rows the report is measured on; 0: none [16]"
    )
    parser.add_argument(
        "--min-sqnr", type=number, metavar="DB", help="exit with 3 if the output's SQNR is lower"
    )


def _add_limits(parser: argparse.ArgumentParser) -> None:
    """What a sweep may take, and where it is kept."""
    parser.add_argument(
        "--budget",
        type=terminal.seconds,
        metavar="TIME",
        help="what all passes may take: 90s, 5min, 1h, overnight; fits rows and iterations [as the policy says]",
    )
    parser.add_argument(
        "--memory",
        type=terminal.size,
        default=6 * 2**30,
        metavar="SIZE",
        help="what a sweep may take beside the model, as 800MB; more goes to disk [6GB]",
    )
    parser.add_argument(
        "--run-dir",
        metavar="FOLDER",
        help="where finished layers are kept: after a kill the same command goes on [OUT.run, removed when all is done]",
    )


def compile_(options: argparse.Namespace) -> int:
    """dmqfx compile; under torchrun by all its processes together."""
    from dmqfx import processes

    with processes.torchrun():
        return _compiled(options)


def _compiled(options: argparse.Namespace) -> int:
    from dmqfx import processes
    from dmqfx.compiler import check_pipeline
    from dmqfx.graph import registry
    from dmqfx.policy.policy import Policy
    from dmqfx.storage.store import refuse_foreign
    from dmqfx.sweep.run import until_done

    if not processes.is_first():
        logging.getLogger("dmqfx").setLevel(logging.ERROR)
    policy = Policy.load(options.policy, options.overrides, check_step=registry.problems_with)
    check_pipeline(policy)
    out = files.to_be_folder(options.out)
    refuse_foreign(out)
    run = _run_directory(options, out)
    floors = _floors(options, policy)
    with nullcontext() if options.run_dir else until_done(run):
        q = _quantized(options, policy, run)
        if processes.is_first():
            q.save_pretrained(out)
    return _told(options, q, out, floors) if processes.is_first() else terminal.OK


def _quantized(options: argparse.Namespace, policy: Policy, run: Path) -> CompiledUNet:
    """The compiled model, which is to be saved and not to be run."""
    from dmqfx import processes
    from dmqfx.compiler import QualityWarning, needs_calibration
    from dmqfx.compiler import compile as compile_unet

    calibration = _given(options, run, wanted=options.rows > 0 or needs_calibration(policy))
    unet = sources.load_unet(options.model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QualityWarning)  # the gate says it
        return compile_unet(
            unet,
            policy,
            calibration=calibration,
            target=sources.unlowered(),  # its weights need not be unpacked
            verify=options.verify,
            seed=options.seed,
            progress=bars() and processes.is_first(),
            report_rows=options.rows,
            budget=options.budget,
            memory=options.memory,
            run_dir=run,
        )


def _run_directory(options: argparse.Namespace, out: Path) -> Path:
    """Where finished layers are kept.

    Raises: DmqfxError if saving the model would take it away.
    """
    from dmqfx.errors import DmqfxError

    run = files.to_be_folder(options.run_dir or f"{out}.run")
    if out.resolve() in (run.resolve(), *run.resolve().parents):
        raise DmqfxError(
            f"--run-dir {run} lies in --out {out}, which is replaced as a whole; say a folder elsewhere"
        )
    return run


def _floors(options: argparse.Namespace, policy: Policy) -> list[float]:
    """The SQNR that the command and the policy want, in dB."""
    from dmqfx.errors import DmqfxError

    floors = [floor for floor in (options.min_sqnr, policy.expect.sqnr_db) if floor is not None]
    if floors and not options.rows:
        raise DmqfxError(f"--rows 0 measures nothing, and {max(floors):g} dB SQNR are wanted; leave it out")
    return floors


def _told(options: argparse.Namespace, q: CompiledUNet, out: Path, floors: Sequence[float]) -> int:
    """The report, and the exit code that its floors give."""
    from dmqfx.policy.policy import Expect

    report = q.report
    assert report is not None  # every compilation makes one
    about = {"folder": str(out.resolve()), "report": report.to_data()}
    terminal.say(options, f"{report}\n\nwritten to {out}", about)
    return terminal.gate(report.misses(Expect(max(floors, default=None))))


def _given(options: argparse.Namespace, run: Path, *, wanted: bool) -> Calibration | None:
    """The calibration that was named, or the bundled model's own, which is kept in the run directory."""
    from dmqfx import emoji, processes
    from dmqfx.evaluation import emoji_calibration
    from dmqfx.sweep.kept import kept

    seed, watched = options.seed, bars() and processes.is_first()

    calibration = sources.load_calibration(options.calibration)
    if calibration is None and wanted and sources.is_emoji(options.model):
        make = partial(emoji_calibration, seed=seed, progress=watched)
        return kept(run, emoji.load_unet(), seed, make, "prompts of the bundled model")
    return calibration
