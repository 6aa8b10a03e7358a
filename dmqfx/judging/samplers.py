"""Drawing pictures with either model: the same noise, prompts and schedule, whichever UNet is given."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Protocol

import numpy as np
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Tensor

from dmqfx import emoji
from dmqfx.calibration.sampling import quiet, refuse_options
from dmqfx.frontend.signature import UNet
from dmqfx.runtime.unet import CompiledUNet

__all__ = ["Drawn", "EmojiSampler", "PipelineSampler", "Sampler", "drift"]


@dataclass(frozen=True, eq=False)
class Drawn:
    """Pictures, and the latents on the way to them: (timestep, what the step from it gave) in order.

    Shapes: pictures [N, C, H, W] in [-1, 1]; latents [N, ...] each.
    """

    pictures: Tensor
    latents: tuple[tuple[float, Tensor], ...]


class Sampler(Protocol):
    """Draws pictures with the UNet that it is given."""

    @property
    def prompts(self) -> Sequence[str]:
        """What it draws; without prompts, empty."""

    @property
    def guidance_scale(self) -> float | None:
        """Of classifier-free guidance, if there is any."""

    @property
    def scheduler(self) -> SchedulerMixin:
        """The schedule."""

    def settings(self) -> Mapping[str, object]:
        """Everything else that the pictures depend on, but for the seed."""

    def __call__(self, unet: UNet | CompiledUNet, seed: int, *, progress: bool = False) -> Drawn:
        """The pictures of a seed."""


@dataclass(frozen=True, eq=False)
class EmojiSampler:
    """Samples the bundled emoji model (or a compiled one), all prompts in one batch.

    Example:
        >>> unet = emoji.load_unet()
        >>> drawn = EmojiSampler(emoji.demo_prompts(1), steps=3)(unet, seed=0)
        >>> drawn.pictures.shape, len(drawn.latents)
        (torch.Size([1, 3, 32, 32]), 3)
    """

    prompts: Sequence[str]
    steps: int = 20
    guidance_scale: float = 3.0
    scheduler: SchedulerMixin = field(default_factory=emoji.load_scheduler)

    def settings(self) -> Mapping[str, object]:
        """Steps."""
        return {"steps": self.steps}

    def __call__(self, unet: UNet | CompiledUNet, seed: int, *, progress: bool = False) -> Drawn:
        """The pictures of a seed."""
        with _following(self.scheduler) as latents:
            last = emoji.sample(
                unet,
                self.prompts,
                steps=self.steps,
                cfg=self.guidance_scale,
                seed=seed,
                scheduler=self.scheduler,
                progress=progress,
            )
        return Drawn(emoji.decode(last).cpu(), tuple(latents))


@dataclass(frozen=True, eq=False)
class PipelineSampler:
    """Runs a pipeline with the UNet that it is given in place of its own, once for each prompt.

    Without prompts, for a pipeline that takes none, it runs `count` times. Run k has a generator of seed + k.
    `options` go to the pipeline as they are.

    Raises: CalibrationError for options that the pipeline does not take.
    """

    pipe: DiffusionPipeline
    prompts: Sequence[str] = ()
    count: int = 1
    steps: int | None = None
    scale: float | None = None
    options: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        refuse_options(self.pipe, self.prompts or None, self._given())

    @property
    def guidance_scale(self) -> float | None:
        """The given one, or the pipeline's own."""
        usual = inspect.signature(type(self.pipe).__call__).parameters.get("guidance_scale")
        return self.scale if self.scale is not None or usual is None else float(usual.default)

    @property
    def scheduler(self) -> SchedulerMixin:
        """The pipeline's."""
        return self.pipe.scheduler

    def settings(self) -> Mapping[str, object]:
        """The pipeline, and what it is called with."""
        return {"pipeline": type(self.pipe).__name__, "steps": self.steps, **self.options}

    def __call__(self, unet: UNet | CompiledUNet, seed: int, *, progress: bool = False) -> Drawn:
        """The pictures of a seed."""
        runs = [{"prompt": prompt} for prompt in self.prompts] or [{}] * self.count
        pictures, paths = list[Tensor](), list[list[tuple[float, Tensor]]]()
        with quiet(self.pipe), _instead(self.pipe, unet):
            for k, run in enumerate(runs):
                generator = torch.Generator().manual_seed(seed + k)
                with _following(self.scheduler) as latents:
                    found = self.pipe(**{**self._given(), **run}, generator=generator).images
                pictures.append(_pictures(found))
                paths.append(latents)
        steps = (tuple(zip(*step, strict=True)) for step in zip(*paths, strict=True))
        return Drawn(torch.cat(pictures), tuple((times[0], torch.cat(parts)) for times, parts in steps))

    def _given(self) -> dict[str, object]:
        wanted = {"num_inference_steps": self.steps, "guidance_scale": self.scale, **self.options}
        given = {name: value for name, value in wanted.items() if value is not None}
        if "output_type" in inspect.signature(type(self.pipe).__call__).parameters:
            given["output_type"] = "np"
        return given


def drift(exact: Drawn, quantized: Drawn) -> tuple[tuple[float, float], ...]:
    """How far one trajectory is from another: (timestep, |q - f| / |f| over all latents after its step).

    Example:
        >>> f, q = (Drawn(torch.empty(0), ((981.0, x),)) for x in (torch.ones(4), torch.tensor([1.0, 1, 1, 3])))
        >>> drift(f, q)
        ((981.0, 1.0),)
    """
    pairs = zip(exact.latents, quantized.latents, strict=True)
    return tuple(
        (time, float((q.double() - f.double()).norm() / f.double().norm())) for (time, f), (_, q) in pairs
    )


@contextmanager
def _following(scheduler: SchedulerMixin) -> Iterator[list[tuple[float, Tensor]]]:
    """Timestep and result of each step of a scheduler inside the block, on the CPU."""
    latents, step = list[tuple[float, Tensor]](), scheduler.step

    @wraps(step)
    def kept(model_output: Tensor, timestep: Tensor | float, *args: object, **kwargs: object) -> object:
        result = step(model_output, timestep, *args, **kwargs)
        latents.append((float(timestep), result[0].detach().to("cpu", copy=True)))
        return result

    scheduler.step = kept
    try:
        yield latents
    finally:
        del scheduler.step  # the class has its own


@contextmanager
def _instead(pipe: DiffusionPipeline, unet: UNet | CompiledUNet) -> Iterator[None]:
    """Another UNet in a pipeline, for a while."""
    before = pipe.unet
    pipe.unet = unet
    try:
        yield
    finally:
        pipe.unet = before


def _pictures(found: object) -> Tensor:
    """What a pipeline gives as pictures: an array [n, H, W, C] in [0, 1], or a list of PIL's."""
    array = found if isinstance(found, np.ndarray) else np.stack([np.asarray(p) for p in found]) / 255.0  # type: ignore[attr-defined]  # an iterable, by what pipelines promise
    return torch.from_numpy(array).movedim(-1, 1).float() * 2 - 1
