"""Commands that judge: eval, verify."""

from __future__ import annotations

import argparse

from dmqfx.cli import sources, terminal
from dmqfx.cli.terminal import Commands, bars, command, whole

TARGETS = ("auto", "simulate", "reference")


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
                "dmqfx eval out/ unet/ --calibration held-out/ --min-sqnr 18",
                "on recorded calls; exit 3 below 18 dB",
            ),
        ),
    )
    parser.add_argument("compiled", metavar="COMPILED", help="folder of `dmqfx compile`")
    terminal.add_model(parser, compiled=False)
    parser.add_argument(
        "--calibration", metavar="FOLDER", help="recorded calls to compare on; best not those of compiling"
    )
    parser.add_argument("--rows", type=whole(1), default=64, help="how many of them [64]")
    parser.add_argument(
        "--target",
        default="auto",
        choices=TARGETS,
        help="what the layers run as; auto is the best there is [auto]",
    )
    parser.add_argument(
        "--seed", type=whole(0), default=1, help="of what is recorded without --calibration [1]"
    )
    parser.add_argument(
        "--min-sqnr", type=float, metavar="DB", help="exit with 3 if the output's SQNR is lower"
    )
    parser.add_argument(
        "--min-psnr", type=float, metavar="DB", help="exit with 3 if the pictures' PSNR is lower"
    )


def eval_(options: argparse.Namespace) -> int:
    """dmqfx eval."""
    from dmqfx import emoji
    from dmqfx.calibration.calibration import Calibration
    from dmqfx.evaluation import emoji_calibration, evaluate

    compiled = sources.load_compiled(options.compiled, options.target)
    unet, data = sources.load_unet(options.model), sources.load_calibration(options.calibration)
    images = None
    if sources.is_emoji(options.model):
        prompts = emoji.demo_prompts()
        data = data or emoji_calibration(prompts, seed=options.seed, progress=bars())
        exact, quantized = (
            emoji.decode(emoji.sample(model, prompts, seed=options.seed, progress=bars()))
            for model in (unet, compiled)
        )
        images = (exact, quantized)
    data = data or Calibration.synthesize(unet, seed=options.seed, progress=bars())
    found = evaluate(unet, compiled, data, images=images, rows=options.rows, progress=bars())
    terminal.say(options, str(found), found.to_data())
    return terminal.gate(found.misses(sqnr_db=options.min_sqnr, psnr_db=options.min_psnr))


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
    policy = Policy.load(options.policy or "w4a8", options.overrides, check_step=registry.problems_with)
    checked = verify_policy(sources.load_unet(options.model), policy, seed=options.seed, progress=bars())
    terminal.say(options, str(checked), checked.to_data())
    return terminal.OK
