"""Commands that judge: eval, verify."""

from __future__ import annotations

import argparse

from dmqfx.cli import files, sources, terminal
from dmqfx.cli.terminal import Commands, bars, command, finite, number, whole


def add_commands(commands: Commands[argparse.ArgumentParser]) -> None:
    """Declare the commands of this file."""
    _eval(commands)
    _verify(commands)


def _eval(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = command(
        commands,
        "eval",
        eval_,
        "compare a compiled UNet with its float model on the same inputs",
        (
            ("dmqfx eval emoji-w4a6/ emoji", "outputs, and pictures of prompts it was not calibrated on"),
            (
                "dmqfx eval emoji-w4a6/ emoji --seed 1 --seed 2 --seed 3 --out found.json",
                "mean and deviation",
            ),
            (
                "dmqfx eval out/ sd15/ --prompts p.txt --scheduler EulerDiscreteScheduler --min-psnr 25",
                "a pipeline, with either UNet; exit 3 below 25 dB",
            ),
            ("dmqfx eval out/ unet/ --calibration held-out/ --min-sqnr 18", "on recorded calls"),
        ),
    )
    parser.add_argument("compiled", metavar="COMPILED", help="folder of `dmqfx compile`")
    terminal.add_model(parser, compiled=False)
    _add_rows(parser)
    _add_pictures(parser)
    parser.add_argument(
        "--target",
        default="auto",
        choices=terminal.TARGETS,
        help="what the layers run as; auto is cpu where its kernels were built, else reference [auto]",
    )
    parser.add_argument("--out", metavar="JSON", help="write everything that was found, and the protocol")
    parser.add_argument(
        "--min-sqnr", type=number, metavar="DB", help="exit with 3 if the output's SQNR is lower"
    )
    parser.add_argument(
        "--min-psnr", type=number, metavar="DB", help="exit with 3 if the pictures' PSNR is lower"
    )
    parser.add_argument(
        "--min-ssim", type=number, metavar="SSIM", help="exit with 3 if the pictures' SSIM is lower"
    )


def _add_rows(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--calibration",
        metavar="FOLDER",
        action="append",
        default=[],
        help="recorded calls to compare on, best not those of compiling; may be repeated",
    )
    parser.add_argument(
        "--rows", type=whole(1), default=64, help="how many calls, at least one of every timestep [64]"
    )


def _add_pictures(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompts", metavar="FILE", help="what to draw, one a line; MODEL is a pipeline folder or emoji"
    )
    parser.add_argument(
        "--pictures", type=whole(1), help="how many, without --prompts [emoji: 16; a pipeline: none]"
    )
    parser.add_argument("--steps", type=whole(1), help="of the schedule [emoji: 20; the pipeline's own]")
    parser.add_argument(
        "--guidance", type=finite, help="scale of guidance [emoji: 3; the pipeline's or recording's own]"
    )
    parser.add_argument("--scheduler", metavar="CLASS", help="of diffusers, e.g. EulerDiscreteScheduler")
    parser.add_argument(
        "--seed", type=whole(0), action="append", default=[], help="of the noise; may be repeated [1]"
    )
    parser.add_argument(
        "--features", metavar="MODULE:FUNCTION", help="for the Fréchet distance [a built-in one, no weights]"
    )
    parser.add_argument(
        "--reference", metavar="PATH", help="pictures for the Fréchet distance: folder, .npz, .safetensors"
    )


def eval_(options: argparse.Namespace) -> int:
    """dmqfx eval."""
    from dmqfx.calibration.calibration import Calibration
    from dmqfx.cli import drawing
    from dmqfx.evaluation import evaluate
    from dmqfx.storage.atomic import replacing_file

    out = files.to_be_file(options.out) if options.out else None
    seeds, features, reference = options.seed or [1], drawing.features(options), drawing.reference(options)
    compiled = sources.load_compiled(options.compiled, options.target)
    recorded = [Calibration.load(folder) for folder in options.calibration]
    unet, sampler = drawing.load_sampler(options)
    drawing.refuse_idle(options, sampler)
    if sampler is None and not recorded:
        recorded = [Calibration.synthesize(unet, seed=seed, progress=bars()) for seed in seeds]
    found = evaluate(
        unet,
        compiled,
        recorded,
        sampler=sampler,
        seeds=seeds,
        rows=options.rows,
        guidance_scale=options.guidance,
        features=features,
        reference=reference,
        progress=bars(),
    )
    if out is not None:
        with replacing_file(out) as file:
            file.write_text(terminal.as_json(found.to_data()), encoding="utf-8")
    terminal.say(options, str(found), found.to_data())
    return terminal.gate(
        found.misses(sqnr_db=options.min_sqnr, psnr_db=options.min_psnr, ssim=options.min_ssim)
    )


def _verify(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = command(
        commands,
        "verify",
        verify,
        "check every pass of a policy on a model, or a saved model",
        (
            ("dmqfx verify emoji --policy w4a8", "each pass on a float64 twin and on the model itself"),
            ("dmqfx verify sd15/ --policy my.yaml", "the same blocks with few channels: the model is large"),
            ("dmqfx verify emoji-w4a8/", "files whole and unaltered, numbers sound, output finite"),
        ),
    )
    terminal.add_model(parser)
    terminal.add_policy(parser)
    parser.set_defaults(policy=None)  # to know whether it was given
    parser.add_argument("--seed", type=whole(0), default=0, help="of the probes [0]")


def verify(options: argparse.Namespace) -> int:
    """dmqfx verify."""
    from dmqfx.checking.modelcheck import verify_policy, verify_saved
    from dmqfx.errors import DmqfxError, StoreError, VerifyError
    from dmqfx.graph import registry
    from dmqfx.policy.policy import Policy

    if sources.is_compiled(options.model):
        if options.policy or options.overrides:
            raise DmqfxError(
                f"{options.model} has its policy already; --policy and --set are for a float model"
            )
        try:
            compiled = sources.load_compiled(options.model)
        except StoreError as error:
            raise VerifyError(str(error), step="load") from error
        found = verify_saved(compiled, seed=options.seed)
        terminal.say(options, "\n".join(found), dict(line.split(maxsplit=1) for line in found))
        return terminal.OK
    policy = Policy.load(options.policy or "w4a8-quick", options.overrides, check_step=registry.problems_with)
    checked = verify_policy(sources.load_unet(options.model), policy, seed=options.seed, progress=bars())
    terminal.say(options, str(checked), checked.to_data())
    return terminal.OK
