"""Denoising noise with a UNet and a scheduler, row by row reproducible."""

from __future__ import annotations

import copy
import inspect
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from diffusers import ControlNetModel, SchedulerMixin, UNet2DModel
from torch import Tensor

from dmqfx import processes
from dmqfx.calibration.recording import Tape
from dmqfx.errors import CalibrationError
from dmqfx.frontend.call import bind
from dmqfx.frontend.signature import UNet, signature

__all__ = [
    "CONCAT", "MOST_TRAJECTORIES", "Denoising", "NotFiniteError", "latent_channels", "refuse_less_than_one",
]  # fmt: skip

CONCAT = "concat"
_TOGETHER = 4  # trajectories in one UNet call: fixed, because the last bits of a result depend on it
_WILD = 2.0  # a latent, scaled as its UNet sees it, has a standard deviation near 1
_MOST_STEPS, _FEWEST_STEPS, MOST_TRAJECTORIES = 20, 8, 8
_ADDED = ("text_embeds", "time_ids", "image_embeds", "hint")


class NotFiniteError(CalibrationError):
    """A UNet whose result is not finite, and the call: by placeholder name."""

    def __init__(self, unet: UNet, timestep: Tensor, call: Mapping[str, Tensor]) -> None:
        self.where = f"at timestep {float(timestep):g}"
        self.call = call
        super().__init__(f"{type(unet).__name__} gives values that are not finite {self.where}")


def refuse_less_than_one(**numbers: int | None) -> None:
    """Refuse numbers of which there would be nothing to denoise, by their names; None is none.

    Raises: CalibrationError.
    """
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise CalibrationError(f"{name} must be at least 1, not {number}")


@dataclass(frozen=True)
class Denoising:
    """A set of trajectories from noise. Trajectory i depends on `seed` and i, not on how many there are.

    Shapes: halves are the parts of a guided batch (one: no guidance), unconditional first. Each maps names of
    inputs, and "concat" for channels behind the latent's, to one row for each trajectory or one for all.
    """

    unet: UNet
    scheduler: SchedulerMixin
    size: tuple[int, int]
    trajectories: int
    steps: int
    halves: tuple[Mapping[str, Tensor], ...] = ({},)
    guidance_scale: float = 1.0
    seed: int = 0
    steady: bool = False

    @property
    def calls(self) -> int:
        """How many UNet calls `run` makes with a scheduler of first order."""
        return self.steps * -(-self.trajectories // _TOGETHER)

    def run(self, tape: Tape) -> int:
        """Run all trajectories; how many times a latent had to be rescaled (only if `steady`).

        Raises: CalibrationError if the UNet gives values that are not finite, or the scheduler has no such steps.
        """
        rescaled = 0
        with torch.no_grad(), _evaluating(self.unet):
            for start in range(0, self.trajectories, _TOGETHER):
                tape.start()
                rescaled += self._denoise(range(start, min(start + _TOGETHER, self.trajectories)))
        return rescaled

    def sized(self, seconds: float, steps: int | None, trajectories: int | None) -> Denoising:
        """As much of it as one timed call says will fit, but at least eight steps of one trajectory.

        Raises: CalibrationError for a time that is none.
        """
        if not 0 <= seconds < math.inf:
            raise CalibrationError(f"seconds must be a finite number of at least 0, not {seconds}")
        begun = time.perf_counter()
        self._first()
        one = processes.agreed(time.perf_counter() - begun)
        rows = int(seconds / one) - 2  # this call and the one that warmed up
        chosen = trajectories or min(max(rows // (steps or _MOST_STEPS), 1), MOST_TRAJECTORIES)
        length = steps or min(max(rows // chosen, _FEWEST_STEPS), _MOST_STEPS)
        return replace(
            self, trajectories=chosen, steps=min(length, self.scheduler.config.num_train_timesteps)
        )

    def predicts_noise(self) -> bool:
        """Whether the prediction for pure noise is that noise; of x0 or v it would be unlike it."""
        latent, predicted = self._first()
        likeness = (
            torch.cosine_similarity(latent.flatten(), predicted.flatten(), 0) if predicted is not None else 1
        )
        return float(likeness) > 0.5

    def _first(self) -> tuple[Tensor, Tensor | None]:
        """The noise that the first trajectory starts from, and the prediction for it."""
        with torch.no_grad(), _evaluating(self.unet):
            _, latent = self._noise(range(1))
            t = torch.tensor(self.scheduler.config.num_train_timesteps - 1)
            return latent, self._predict(latent, t, self._conditions(range(1)))

    def _denoise(self, numbers: range) -> int:
        scheduler = copy.deepcopy(self.scheduler)
        try:
            scheduler.set_timesteps(self.steps)
        except ValueError as error:
            raise CalibrationError(
                f"{type(scheduler).__name__} makes no {self.steps} steps: {error}"
            ) from error
        generators, latent = self._noise(numbers)
        latent = latent * scheduler.init_noise_sigma
        random = (
            {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
        )
        conditions, rescaled = self._conditions(numbers), 0
        for t in scheduler.timesteps:
            if self.steady:
                spread = _spread(scheduler.scale_model_input(latent, t))
                latent = torch.where(spread > _WILD, latent / spread, latent)
                rescaled += int((spread > _WILD).sum())
            predicted = self._predict(scheduler.scale_model_input(latent, t), t, conditions)
            if predicted is not None:
                latent = scheduler.step(predicted, t, latent, **random, return_dict=False)[0]
        return rescaled

    def _noise(self, numbers: range) -> tuple[list[torch.Generator], Tensor]:
        """A generator of its own and a first latent for each trajectory."""
        generators = [torch.Generator().manual_seed(self.seed + number) for number in numbers]
        shape = (latent_channels(self.unet), *self.size)
        return generators, torch.stack([torch.randn(shape, generator=g) for g in generators]).to(
            self.unet.device
        )

    def _conditions(self, numbers: range) -> dict[str, Tensor]:
        """The conditioning of some trajectories, all halves of the batch in one."""

        def rows(tensor: Tensor) -> Tensor:
            if tensor.dim() == 0:
                return tensor
            return (
                tensor.expand(len(numbers), *tensor.shape[1:]) if len(tensor) == 1 else tensor[list(numbers)]
            )

        halves = [{name: rows(tensor) for name, tensor in half.items()} for half in self.halves]
        stacked = {
            n: t if t.dim() == 0 else torch.cat([half[n] for half in halves]) for n, t in halves[0].items()
        }
        return {
            n: t.to(self.unet.device, self.unet.dtype if t.is_floating_point() else None)
            for n, t in stacked.items()
        }

    def _predict(self, latent: Tensor, t: Tensor, conditions: Mapping[str, Tensor]) -> Tensor | None:
        """What the scheduler takes: guided, without a learned variance; None from what does not denoise."""
        sample = torch.cat([latent] * len(self.halves)).to(self.unet.dtype)
        rest = dict(conditions)
        if CONCAT in rest:
            sample = torch.cat([sample, rest.pop(CONCAT)], dim=1)
        named = _arguments(self.unet, rest)
        result = self.unet(sample, t, **named, return_dict=False)[0]
        if isinstance(self.unet, ControlNetModel):
            return None
        if not torch.isfinite(result).all():
            raise NotFiniteError(self.unet, t, bind(signature(self.unet), (sample, t), named))
        first, *guided = result.float().chunk(len(self.halves))
        prediction: Tensor = first + self.guidance_scale * (guided[0] - first) if guided else first
        learned = str(self.scheduler.config.get("variance_type", "")).startswith("learned")
        return prediction if learned else prediction[:, : latent.shape[1]]


def latent_channels(unet: UNet) -> int:
    """Channels that are denoised: a UNet may take more (conditions) or give more (a variance)."""
    taken = int(signature(unet).inputs[0].dims[1])
    return min(taken, int(unet.config.get("out_channels", taken)))


def _spread(latent: Tensor) -> Tensor:
    """Standard deviation of each row, in a shape that divides it."""
    return latent.flatten(1).std(1).reshape(-1, *[1] * (latent.dim() - 1))


def _arguments(unet: UNet, named: Mapping[str, Tensor]) -> dict[str, object]:
    """Placeholder names as keywords of a diffusers call."""
    added = {name: tensor for name, tensor in named.items() if name in _ADDED}
    rest: dict[str, object] = {name: tensor for name, tensor in named.items() if name not in _ADDED}
    if not isinstance(unet, UNet2DModel):
        rest = {"encoder_hidden_states": None, **rest, "added_cond_kwargs": added or None}
    return rest


@contextmanager
def _evaluating(unet: UNet) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module is in the mode it had."""
    modes = [(module, module.training) for module in unet.modules()]
    unet.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
