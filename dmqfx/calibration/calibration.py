"""Calibration data: the calls that a UNet really receives, recorded once and used by every policy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import TYPE_CHECKING, Literal, TypeAlias, overload

import torch
from torch import Tensor

from dmqfx.calibration import fit
from dmqfx.calibration.rows import Rows, joined, stratified
from dmqfx.errors import CalibrationError
from dmqfx.graph.inputs import InputSpec

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin

    from dmqfx.frontend.signature import UNet

__all__ = ["Calibration", "CalibrationWarning", "Json", "Origin"]

Json: TypeAlias = "str | int | float | bool | list[Json] | dict[str, Json] | None"


_ZERO = torch.zeros(1, 1, 1, 1)


class CalibrationWarning(UserWarning):
    """Calibration data that can be used but is not what the model will see.

    Example:
        >>> import warnings
        >>> warnings.simplefilter("error", CalibrationWarning)  # rather stop than calibrate on random prompts
    """


@dataclass(frozen=True)
class Origin:
    """Where rows came from.

    Units: config and weights are SHA-256 fingerprints of the model's configuration and of a few weights.
    """

    how: Literal["pipeline", "sampler", "synthetic", "tape"]
    model: str
    config: str
    weights: str
    scheduler: str = ""
    scheduler_config: Mapping[str, Json] = field(default_factory=dict)
    settings: Mapping[str, Json] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Calibration:
    """Recorded UNet calls. A row is one sample of one call; rows of equal shapes form a group.

    A trajectory is one place in a sampler's batch, followed over its steps: with guidance, the unconditional
    and the conditional half are two trajectories. A step counts the UNet calls of a trajectory from 0.

    Example:
        >>> from dmqfx import emoji
        >>> words = {"encoder_hidden_states": emoji.embed(emoji.calibration_prompts(2))}
        >>> calibration = Calibration.record(
        ...     emoji.load_unet(), scheduler=emoji.load_scheduler(), conditioning=words, steps=3
        ... )
        >>> len(calibration), calibration.timesteps().unique().tolist()
        (6, [0.0, 333.0, 666.0])
    """

    groups: tuple[Rows, ...]
    origins: tuple[Origin, ...] = ()

    def __repr__(self) -> str:
        steps = self.timesteps()
        span = f", timesteps {steps.min():g}..{steps.max():g}" if len(steps) else ""
        schedulers = sorted({origin.scheduler for origin in self.origins if origin.scheduler})
        return f"Calibration({len(self)} rows{span}{', '.join(['', *schedulers])})"

    @overload
    @classmethod
    def record(
        cls,
        source: DiffusionPipeline,
        *,
        prompts: Sequence[str] | None = None,
        module: UNet | None = None,
        trajectories: int = 1,
        steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int = 0,
        progress: bool | None = None,
        **options: object,
    ) -> Calibration: ...

    @overload
    @classmethod
    def record(
        cls,
        source: UNet,
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
    ) -> Calibration: ...

    @classmethod
    def record(cls, source: DiffusionPipeline | UNet, **options: object) -> Calibration:
        """Run a pipeline, or a UNet with a scheduler, and keep every call of the UNet.

        A pipeline runs once for each prompt (without prompts: `trajectories` times), the i-th time with a
        generator of seed + i; other keywords go to it as they are, and its errors are raised.

        With a UNet, `conditioning` holds what it takes beside sample and timestep, by name, one row for each
        trajectory or one for all; `unconditional` what differs in the other half of a guided batch; `concat`
        the channels behind the latent's.

        Raises: CalibrationError for options that the source cannot take.
        """
        from dmqfx.calibration import sampling  # runs samplers into Calibrations, so it comes later

        return sampling.record(source, options)

    @classmethod
    def synthesize(
        cls,
        unet: UNet,
        *,
        scheduler: SchedulerMixin | None = None,
        steps: int | None = None,
        trajectories: int | None = None,
        seconds: float = 60.0,
        seed: int = 0,
        progress: bool | None = None,
    ) -> Calibration:
        """Make one from the model itself: DDIM trajectories from noise.

        Prompts, labels and the like are random, and a CalibrationWarning says so.

        What is not said is chosen to take about `seconds`: 8 to 20 steps of 1 to 8 trajectories. Seed, steps
        and trajectories (see `describe`) determine the result.

        Raises: CalibrationError if the model gives values that are not finite.
        """
        from dmqfx.calibration import sampling

        return sampling.synthetic(
            unet,
            scheduler=scheduler,
            steps=steps,
            trajectories=trajectories,
            seconds=seconds,
            seed=seed,
            progress=progress,
        )

    @classmethod
    def load(cls, directory: str | PathLike[str]) -> Calibration:
        """Read what `save` wrote.

        Raises: StoreError if anything is missing, truncated, altered or newer than this version.
        """
        from dmqfx.calibration import shards  # the file format knows Calibration, so it comes later

        return shards.load(directory)

    def save(self, directory: str | PathLike[str], *, shard_bytes: int = 512 * 2**20) -> None:
        """Write safetensors shards and `calibration.json`; an older calibration stays whole until the end.

        Raises: StoreError if the directory cannot be written.
        """
        from dmqfx.calibration import shards

        shards.save(self, directory, shard_bytes=shard_bytes)

    def __len__(self) -> int:
        return sum(map(len, self.groups))

    def batches(
        self, size: int, inputs: InputSpec | None = None, *, dtype: torch.dtype = torch.float32
    ) -> Iterator[dict[str, Tensor]]:
        """All rows in recorded order, at most `size` of equal shapes at a time, by placeholder name.

        With `inputs`, exactly what that program takes: residuals that no row has are zeros that broadcast.
        Floating tensors are cast to `dtype`; timesteps stay float32 and labels int64.

        Raises: ValueError if size is below 1.
        """
        if size < 1:
            raise ValueError(f"a batch holds at least 1 row, not {size}")
        for group in self.groups:
            for start in range(0, len(group), size):
                batch = group.tensors(slice(start, start + size))
                if inputs is not None:
                    batch = {i.name: batch.get(i.name, _ZERO) for i in inputs.inputs}
                yield {name: _cast(name, tensor, dtype) for name, tensor in batch.items()}

    def timesteps(self) -> Tensor:
        """The timestep of every row, as the UNet received it.

        Shapes: float32 [rows].
        """
        found = [group.columns["timestep"].rows(slice(None)) for group in self.groups]
        return torch.cat(found) if found else torch.empty(0)

    def trajectories(self) -> Tensor:
        """Which trajectory each row belongs to.

        Shapes: int64 [rows].
        """
        return torch.cat([torch.empty(0, dtype=torch.int64), *(group.trajectory for group in self.groups)])

    def steps(self) -> Tensor:
        """Which UNet call of its trajectory each row was.

        Shapes: int64 [rows].
        """
        return torch.cat([torch.empty(0, dtype=torch.int64), *(group.step for group in self.groups)])

    def columns(self) -> dict[str, Tensor]:
        """All that results depend on, what a UNet is called with and which sample each row is of, by name: for digests."""
        found: dict[str, Tensor] = {}
        for k, group in enumerate(self.groups):
            found |= {f"{k}:trajectory": group.trajectory, f"{k}:step": group.step}
            for name, column in group.columns.items():
                found |= {f"{k}/{name}": column.values, f"{k}/{name}/index": column.index}
            found |= {f"{k}/{name}": torch.tensor(value) for name, value in group.scalars.items()}
        return found

    def select(self, rows: int, generator: torch.Generator) -> Calibration:
        """A random subset in which timesteps have shares as equal as can be; all rows if there are no more.

        Raises: ValueError if rows is below 1.
        """
        if rows < 1:
            raise ValueError(f"a selection holds at least 1 row, not {rows}")
        if rows >= len(self):
            return self
        chosen = stratified(self.timesteps(), rows, generator)
        groups, start = list[Rows](), 0
        for group in self.groups:
            inside = chosen[(chosen >= start) & (chosen < start + len(group))]
            if len(inside):
                groups.append(group.take(inside - start))
            start += len(group)
        return replace(self, groups=tuple(groups))

    def merge(self, *others: Calibration) -> Calibration:
        """The rows of several recordings of one model; trajectories are numbered on.

        Raises: CalibrationError if the models have different configurations.
        """
        groups, origins, used = list(self.groups), list(self.origins), _numbers(self)
        for other in others:
            models = {f"{o.model} ({o.config[:8]})": o.config for o in (*origins, *other.origins)}
            if len(models) > 1:
                raise CalibrationError(
                    f"cannot merge rows of {' and '.join(models)}: their configurations differ"
                )
            groups += [replace(group, trajectory=group.trajectory + used) for group in other.groups]
            origins += [origin for origin in other.origins if origin not in origins]
            used += _numbers(other)
        return Calibration(joined(groups), tuple(origins))

    def check(self, inputs: InputSpec) -> None:
        """Refuse data that a program with these inputs cannot use.

        Raises: CalibrationError that names what differs, or the first row and tensor that is not finite.
        """
        fit.check(self.groups, inputs, [origin.model for origin in self.origins])

    def describe(self) -> str:
        """What is in it, in a few lines."""
        times = self.timesteps()
        lines = [f"{len(self)} rows  {_numbers(self)} trajectories  {len(set(times.tolist()))} timesteps"]
        if len(self):
            lines[0] += f" from {times.max():g} to {times.min():g}"
        lines += [f"  {len(group):5d} x {fit.listing(group)}" for group in self.groups]
        for origin in self.origins:
            settings = "  ".join(f"{name}={_short(value)}" for name, value in origin.settings.items())
            model = f"{origin.model} ({origin.config[:8]})"
            lines.append(f"  {origin.how}: {model}  {origin.scheduler}  {settings}".rstrip())
            lines += [f"    note: {note}" for note in origin.notes]
        return "\n".join(lines)


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() and name != "timestep" else tensor


def _numbers(calibration: Calibration) -> int:
    """One more than the highest trajectory number."""
    return max((int(group.trajectory.max()) + 1 for group in calibration.groups if len(group)), default=0)


def _short(value: Json) -> str:
    return f"{len(value)} entries" if isinstance(value, (list, dict)) else str(value)
