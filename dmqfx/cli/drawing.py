"""What `dmqfx eval` draws pictures with: the bundled model or a pipeline, a schedule, features, a reference."""

from __future__ import annotations

import argparse
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from dmqfx.cli import files, sources
from dmqfx.errors import DmqfxError

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

    from dmqfx.frontend.signature import UNet
    from dmqfx.judging.features import Features
    from dmqfx.judging.samplers import Sampler

__all__ = ["features", "load_sampler", "reference"]

_FOR_PICTURES = ("steps", "scheduler", "features", "reference")


def load_sampler(options: argparse.Namespace) -> tuple[UNet, Sampler | None]:
    """The float UNet and what draws pictures with it; None for a UNet alone, or a pipeline not asked to draw.

    Raises: DmqfxError for options that cannot be met together.
    """
    if options.prompts and options.pictures is not None:
        raise DmqfxError("--pictures is for a model that needs no --prompts: each prompt is drawn once")
    if sources.is_emoji(options.model):
        from dmqfx import emoji

        return emoji.load_unet(), _emoji(options)
    if options.prompts or options.pictures is not None:
        return _pipeline(options)
    idle = [f"--{name}" for name in _FOR_PICTURES if getattr(options, name) is not None]
    if idle:
        raise DmqfxError(f"{', '.join(idle)}: for pictures, and none are drawn; say --prompts or --pictures")
    return sources.load_unet(options.model), None


def features(options: argparse.Namespace) -> Features:
    """The feature space of --features.

    Raises: DmqfxError if there is no such function.
    """
    from dmqfx.judging.features import HAAR, load_features

    return load_features(options.features) if options.features else HAAR


def reference(options: argparse.Namespace) -> Path | None:
    """The pictures of --reference; for the bundled model, what is known of its training images."""
    from dmqfx import emoji

    if options.reference:
        return Path(options.reference)
    known = sources.is_emoji(options.model) and not options.features
    return emoji.REFERENCE if known else None


def _emoji(options: argparse.Namespace) -> Sampler:
    from dmqfx import emoji
    from dmqfx.judging.samplers import EmojiSampler

    shown = emoji.demo_prompts(options.pictures or 16)
    prompts = files.read_prompts(options.prompts) if options.prompts else shown
    emoji.embed(prompts)  # what it does not know is said before anything long
    steps = 20 if options.steps is None else options.steps
    scale = 3.0 if options.guidance is None else options.guidance
    return EmojiSampler(prompts, steps, scale, _scheduler(options, emoji.load_scheduler()))


def _pipeline(options: argparse.Namespace) -> tuple[UNet, Sampler]:
    from dmqfx.judging.samplers import PipelineSampler

    prompts = files.read_prompts(options.prompts) if options.prompts else ()
    pipe = sources.load_pipeline(options.model)
    pipe.scheduler = _scheduler(options, pipe.scheduler)
    sampler = PipelineSampler(pipe, prompts, options.pictures or 1, options.steps, options.guidance)
    return pipe.unet.float().eval(), sampler


def _scheduler(options: argparse.Namespace, usual: SchedulerMixin) -> SchedulerMixin:
    """The scheduler that --scheduler names, configured like the usual one.

    Raises: DmqfxError if there is none, or it cannot make so many steps.
    """
    import diffusers

    chosen = usual
    if options.scheduler:
        kind = getattr(diffusers, options.scheduler, None)
        if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
            names = [name for name in dir(diffusers) if name.endswith("Scheduler")]
            near = ", ".join(get_close_matches(options.scheduler, names, 3))
            raise DmqfxError(f"diffusers has no scheduler {options.scheduler!r}; near it: {near or 'none'}")
        chosen = kind.from_config(usual.config)  # type: ignore[attr-defined]  # diffusers is Any to the type checker
    try:
        chosen.set_timesteps(options.steps or 20)
    except ValueError as error:
        raise DmqfxError(f"{type(chosen).__name__} makes no {options.steps} steps: {error}") from error
    return chosen
