"""Running samplers in order to record them: a pipeline, a UNet with a scheduler, or a UNet alone."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace

import torch
from diffusers import ControlNetModel, DDIMScheduler, DiffusionPipeline, SchedulerMixin, UNet2DModel
from torch import Tensor
from tqdm import tqdm

from dmqfx.calibration.calibration import Calibration, CalibrationWarning
from dmqfx.calibration.denoising import (
    CONCAT,
    MOST_TRAJECTORIES,
    Denoising,
    NotFiniteError,
    latent_channels,
    refuse_less_than_one,
)
from dmqfx.calibration.recording import Tape, recording, refuse_others
from dmqfx.errors import CalibrationError, CaptureError
from dmqfx.frontend.capture import capture
from dmqfx.frontend.signature import UNet, is_supported, signature
from dmqfx.sweep.finite import refuse_overflow_of

__all__ = ["quiet", "record", "refuse_options", "synthetic", "warn_of_random"]

_RANDOM = "random "  # how the note of conditions that were drawn begins


def record(source: DiffusionPipeline | UNet, options: Mapping[str, object]) -> Calibration:
    """Run a pipeline, or denoise with a UNet, and record it: see Calibration.record.

    Raises: CalibrationError for another object, or options that it does not take.
    """
    if isinstance(source, DiffusionPipeline):
        return from_pipeline(source, **options)  # type: ignore[arg-type]  # see the overloads of Calibration.record
    if not isinstance(source, torch.nn.Module):
        raise CalibrationError(f"what is recorded is a pipeline or a UNet, not {type(source).__name__}")
    taken = inspect.signature(from_sampler)
    try:
        taken.bind(source, **options)
    except TypeError as error:
        names = ", ".join(list(taken.parameters)[1:])
        raise CalibrationError(f"recording {type(source).__name__}: {error}; it takes {names}") from error
    return from_sampler(source, **options)  # type: ignore[arg-type]  # see the overloads of Calibration.record


def from_pipeline(
    pipe: DiffusionPipeline,
    *,
    prompts: Sequence[str] | None = None,
    module: UNet | None = None,
    trajectories: int = 1,
    steps: int | None = None,
    guidance_scale: float | None = None,
    seed: int = 0,
    progress: bool | None = None,
    **options: object,
) -> Calibration:
    """Run a pipeline once for each prompt and record the calls of its UNet: see Calibration.record.

    Raises: CalibrationError for an option that the pipeline does not take; whatever the pipeline raises.
    """
    unet = _unet_of(pipe) if module is None else module
    refuse_less_than_one(trajectories=trajectories, steps=steps)
    wanted = {"num_inference_steps": steps, "guidance_scale": guidance_scale, **options}
    given = {name: value for name, value in wanted.items() if value is not None}
    refuse_options(pipe, prompts, given)
    if "output_type" in inspect.signature(type(pipe).__call__).parameters:
        given.setdefault("output_type", "latent")  # nobody looks at the pictures: spare the decoder
    runs = [{"prompt": prompt} for prompt in prompts] if prompts is not None else [{}] * trajectories
    with quiet(pipe), _watched(unet, progress, len(runs) * steps if steps else None) as tape:
        for k, run in enumerate(runs):
            tape.start()
            pipe(**{"generator": torch.Generator().manual_seed(seed + k), **given, **run})
    settings = {"seed": seed, "prompts": prompts, **given}
    return tape.calibration("pipeline", scheduler=pipe.scheduler, settings=settings)


def from_sampler(
    unet: UNet,
    *,
    scheduler: SchedulerMixin,
    conditioning: Mapping[str, Tensor] | None = None,
    unconditional: Mapping[str, Tensor] | None = None,
    concat: Tensor | None = None,
    trajectories: int | None = None,
    steps: int = 20,
    guidance_scale: float | None = None,
    size: tuple[int, int] | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Calibration:
    """Denoise noise with a UNet and a scheduler and record the calls: see Calibration.record.

    Shapes: conditioning and concat have one row for each trajectory or one for all.
    Raises: CalibrationError if the conditioning does not fit the UNet.
    """
    refuse_others(unet)
    refuse_less_than_one(trajectories=trajectories, steps=steps, size=None if size is None else min(size))
    given = {**(conditioning or {}), **({} if concat is None else {CONCAT: concat})}
    if unconditional and guidance_scale is None:
        raise CalibrationError(
            "unconditional= without guidance_scale= changes nothing; say how strong guidance is"
        )
    count = trajectories or max((len(rows) for rows in given.values()), default=MOST_TRAJECTORIES)
    halves = (given,) if guidance_scale is None else ({**given, **(unconditional or {})}, given)
    _refuse_conditioning(unet, halves, count)
    scale = 1.0 if guidance_scale is None else guidance_scale
    found = Denoising(unet, scheduler, size or _size(unet), count, steps, halves, scale, seed)
    with _naming_overflow(unet), _watched(unet, progress, found.calls) as tape:
        found.run(tape)
    settings = {"seed": seed, "steps": steps, "trajectories": count, "guidance_scale": guidance_scale}
    return tape.calibration("sampler", scheduler=scheduler, settings=settings)


def synthetic(
    unet: UNet,
    *,
    scheduler: SchedulerMixin | None = None,
    steps: int | None = None,
    trajectories: int | None = None,
    seconds: float = 60.0,
    seed: int = 0,
    progress: bool | None = None,
) -> Calibration:
    """Denoise noise with a UNet alone, under random conditions: see Calibration.synthesize.

    Raises: CalibrationError if the UNet gives values that are not finite.
    """
    refuse_others(unet)
    refuse_less_than_one(trajectories=trajectories, steps=steps)
    drawn = _drawn(unet, trajectories or MOST_TRAJECTORIES, seed)
    chosen, notes = scheduler or _usual_scheduler(unet), list[str]()
    plan = Denoising(
        unet, chosen, _size(unet), trajectories or 1, steps or 1, (drawn,), seed=seed, steady=True
    )
    with _naming_overflow(unet):
        if scheduler is None:
            kind = "epsilon" if plan.predicts_noise() else "v_prediction"
            plan = replace(plan, scheduler=DDIMScheduler.from_config(chosen.config, prediction_type=kind))
            notes.append(f"the scheduler is a guess: DDIM, {kind}, {chosen.config.beta_schedule} betas")
        if steps is None or trajectories is None:
            plan = plan.sized(seconds, steps, trajectories)
        with _watched(unet, progress, plan.calls) as tape:
            rescaled = plan.run(tape)
    if drawn:
        notes.append(f"{_RANDOM}{', '.join(drawn)}")
    if rescaled:
        notes.append(
            f"latents that grew were scaled back {rescaled} times in {plan.steps * plan.trajectories} rows"
        )
    settings = {"seed": seed, "steps": plan.steps, "trajectories": plan.trajectories}
    found = tape.calibration("synthetic", scheduler=plan.scheduler, settings=settings, notes=tuple(notes))
    warn_of_random(unet, found)
    return found


def warn_of_random(unet: UNet, calibration: Calibration) -> None:
    """Say to the caller's caller's caller which conditions are random in a calibration of the model, if any are."""
    notes = [note for origin in calibration.origins for note in origin.notes]
    for names in (note.removeprefix(_RANDOM) for note in notes if note.startswith(_RANDOM)):
        warnings.warn(_warning(unet, names), CalibrationWarning, stacklevel=4)


def _usual_scheduler(unet: UNet) -> DDIMScheduler:
    """What a UNet of this class is mostly trained with."""
    spacing = "linspace"
    if unet.config.get("time_embedding_type") == "fourier":
        spacing = "trailing"  # these divide by the time, and linspace ends at 0
    common = {
        "clip_sample": False,
        "timestep_spacing": spacing,
        "num_train_timesteps": unet.config.get("num_train_timesteps") or 1000,
    }
    if isinstance(unet, UNet2DModel):
        return DDIMScheduler(**common)
    stable_diffusion = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    return DDIMScheduler(**common, **stable_diffusion)


def _drawn(unet: UNet, trajectories: int, seed: int) -> dict[str, Tensor]:
    """Random conditions: those of trajectory i are the same however many there are."""
    spec = signature(unet)
    channels = int(spec.inputs[0].dims[1]) - latent_channels(unet)
    rows = list[dict[str, Tensor]]()
    for number in range(trajectories):
        generator = torch.Generator().manual_seed(2**32 + seed + number)  # not the one that draws its noise
        row = spec.draw(generator, B=1)
        if channels:
            row[CONCAT] = torch.randn(1, channels, *_size(unet), generator=generator)
        rows.append(row)
    names = [name for name in rows[0] if name not in ("sample", "timestep")]
    drawn = {n: torch.cat([row[n] for row in rows]) for n in names if rows[0][n].dim()}
    return drawn | {n: torch.ones(()) for n in names if not rows[0][n].dim()}


def _warning(unet: UNet, names: str) -> str:
    return (
        f"calibrating {type(unet).__name__} on random {names}: "
        "the ranges may not be those of real use\n"
        "  mend: calibration=Calibration.record(pipe, prompts=[...]), or\n"
        "        calibration=Calibration.record(unet, scheduler=..., conditioning={...}), or\n"
        "        dmqfx calibrate PIPELINE --prompts FILE --out cal/, then --calibration cal/"
    )


def _size(unet: UNet) -> tuple[int, int]:
    sizes = signature(unet).sizes
    return sizes["H"], sizes["W"]


def _unet_of(pipe: DiffusionPipeline) -> UNet:
    unet = getattr(pipe, "unet", None)
    if not is_supported(unet):
        names = ", ".join(name for name, part in pipe.components.items() if is_supported(part)) or "none"
        compiled = " (record before torch.compile, or with module=pipe.unet._orig_mod)"
        raise CalibrationError(
            f"{type(pipe).__name__}.unet is {type(unet).__name__}, which cannot be recorded\n"
            f"  mend: say which module with module=; its parts that can be recorded: {names}"
            + compiled
            * hasattr(unet, "_orig_mod")
        )
    return unet


def refuse_options(
    pipe: DiffusionPipeline, prompts: Sequence[str] | None, given: Mapping[str, object]
) -> None:
    """Refuse what the pipeline does not take, and prompts that are missing.

    Raises: CalibrationError.
    """
    taken = inspect.signature(type(pipe).__call__).parameters
    free = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
    free = free and not type(pipe).__module__.startswith("diffusers.")  # there **kwargs swallows misspellings
    asked = {**given, **({} if prompts is None else {"prompt": prompts})}
    unknown = [name for name in asked if name not in taken and not free]
    if unknown:
        raise CalibrationError(
            f"{type(pipe).__name__} takes no {', '.join(unknown)}; it takes {', '.join(list(taken)[1:])}"
        )
    if isinstance(prompts, str):
        raise CalibrationError(f"prompts is a list of prompts: prompts=[{prompts!r}]")
    if "prompt" in taken and not prompts and "prompt" not in given and "prompt_embeds" not in given:
        raise CalibrationError(f"{type(pipe).__name__} needs at least one prompt: prompts=[...]")


def _refuse_conditioning(unet: UNet, halves: Sequence[Mapping[str, Tensor]], count: int) -> None:
    if isinstance(unet, ControlNetModel):
        raise CalibrationError(
            "a ControlNet does not denoise: record it in its pipeline, with module=pipe.controlnet"
        )
    wanted = {i.name for i in signature(unet).inputs} - {"sample", "timestep"}
    if int(signature(unet).inputs[0].dims[1]) > latent_channels(unet):
        wanted.add(CONCAT)
    first, given = halves[0], halves[-1]
    missing, extra = sorted(wanted - set(given)), sorted(set(first) - wanted)
    if missing or extra:
        raise CalibrationError(
            f"{type(unet).__name__} needs the conditioning {', '.join(sorted(wanted)) or '(none)'}"
            + f"; missing: {', '.join(missing)}" * bool(missing)
            + f"; not known: {', '.join(extra)}" * bool(extra)
        )
    if len(halves) > 1 and all(first[name] is given[name] for name in given):
        raise CalibrationError(
            "guidance needs unconditional={...}: what the other half of the batch is conditioned on"
        )
    for half in halves:
        for name, rows in half.items():
            if len(rows) not in (1, count):
                raise CalibrationError(
                    f"{name} has {len(rows)} rows for {count} trajectories: give one, or one for each"
                )


@contextmanager
def _watched(unet: UNet, progress: bool | None, total: int | None) -> Iterator[Tape]:
    """A recording with a progress bar: on a terminal only, unless told."""
    hidden = None if progress is None else not progress
    with recording(unet) as tape, tqdm(total=total, desc="record", unit="call", disable=hidden) as bar:

        def tick(*_: object) -> None:
            bar.update()

        ticking = unet.register_forward_hook(tick)
        try:
            yield tape
        finally:
            ticking.remove()


@contextmanager
def _naming_overflow(unet: UNet) -> Iterator[None]:
    """A UNet's result that is not finite is an error that names the first operation, once no hook is there to capture."""
    try:
        yield
    except NotFiniteError as error:
        with suppress(CaptureError):  # what cannot be captured has no names for its operations
            refuse_overflow_of(capture(unet), error.call, f"call {error.where}")
        raise


@contextmanager
def quiet(pipe: DiffusionPipeline) -> Iterator[None]:
    """The pipeline's own progress bar off: it would be drawn through ours."""
    before = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)
