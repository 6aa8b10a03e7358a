"""What `dmqfx eval` draws pictures with: the bundled model or a pipeline, a schedule, features, a reference."""

from __future__ import annotations

import argparse
import copy
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from dmqfx.cli import files, sources
from dmqfx.errors import DmqfxError

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

    from dmqfx.frontend.signature import UNet
    from dmqfx.judging.features import Features
    from dmqfx.judging.samplers import Sampler

__all__ = ["features", "load_sampler", "reference", "refuse_idle"]

_FOR_PICTURES = ("steps", "scheduler", "features", "reference")
_STEPS = 20  # unless --steps says
_USUAL = "DDIMScheduler, DDPMScheduler, PNDMScheduler, EulerDiscreteScheduler or DPMSolverMultistepScheduler"


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


def refuse_idle(options: argparse.Namespace, sampler: Sampler | None) -> None:
    """Refuse options that would change nothing of what is drawn or compared.

    Raises: DmqfxError that names them.
    """
    if sampler is None and options.calibration and options.seed:
        raise DmqfxError(
            "--seed is of the noise that calls are made from: those of --calibration are made already"
        )
    asked = [f"--{name}" for name in ("features", "reference") if getattr(options, name) is not None]
    if asked and sampler is not None and (len(sampler.prompts) or options.pictures or 1) < 2:
        raise DmqfxError(
            f"{', '.join(asked)}: for the Fréchet distance, which takes at least 2 pictures; 1 is drawn"
        )


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
    steps = options.steps or _STEPS
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

    Raises: DmqfxError if there is none, it is not for such models, or it cannot make so many steps.
    """
    chosen = _like(usual, options.scheduler) if options.scheduler else usual
    steps = options.steps or _STEPS
    try:
        chosen.set_timesteps(steps)
    except ValueError as error:
        raise DmqfxError(f"{type(chosen).__name__} makes no {steps} steps: {error}") from error
    return chosen


def _like(usual: SchedulerMixin, name: str) -> SchedulerMixin:
    """The scheduler of this name, configured like the usual one.

    Raises: DmqfxError if there is none, or it is not for such models.
    """
    kind = _named(name)
    try:
        chosen = kind.from_config(usual.config)
        _drive(copy.deepcopy(chosen))
    except Exception as error:  # whatever one raises that is made for other models
        raise DmqfxError(
            f"{name} cannot draw with this model: {type(error).__name__}: {error}\n"
            f"  mend: one that steps from the noise or the velocity that a UNet predicts, such as {_USUAL}"
        ) from error
    return chosen


def _named(name: str) -> type[SchedulerMixin]:
    """A scheduler of diffusers.

    Raises: DmqfxError if there is none of this name, or a package that it needs is missing.
    """
    import diffusers

    kind = getattr(diffusers, name, None)
    if isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin):
        return kind
    known = [each for each in dir(diffusers) if each.endswith("Scheduler")]
    missing = [package for package in getattr(kind, "_backends", ()) if find_spec(package) is None]
    if name in known and missing:
        raise DmqfxError(f"{name} needs {' and '.join(missing)}\n  mend: pip install {' '.join(missing)}")
    near = ", ".join(get_close_matches(name, known, 3))
    raise DmqfxError(f"diffusers has no scheduler {name!r}; near it: {near or 'none'}")


def _drive(scheduler: SchedulerMixin) -> None:
    """Step as a sampler does, with ones for noise and predictions; what is driven otherwise raises something."""
    import torch

    latent = torch.ones(1, 4, 8, 8)
    learned = str(scheduler.config.get("variance_type", "")).startswith("learned")
    predicted = torch.ones(1, 8 if learned else 4, 8, 8)
    with torch.random.fork_rng(devices=()):
        scheduler.set_timesteps(min(_STEPS, scheduler.config.num_train_timesteps))
        latent = latent * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            scheduler.scale_model_input(latent, t)
            latent = scheduler.step(predicted, t, latent, return_dict=False)[0]
