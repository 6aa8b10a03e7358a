"""What an evaluation found: the numbers of each run, their mean and spread, as words and as plain data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Final

from dmqfx.calibration.calibration import Json
from dmqfx.judging.outputs import Output

__all__ = ["ENDS", "Evaluation", "Run", "Spread", "mean_db"]

ENDS: Final = 5  # timesteps at either end that are told apart: the first compose, the last give detail


@dataclass(frozen=True)
class Run:
    """What one seed, or one recording, showed.

    Units: outputs by timestep, from the first to the last, guided ones at guidance_scale; drift is (timestep,
    |q - f| / |f| of the latents after its step), for some schedulers several of one timestep; psnr_db, ssim,
    lpips of each picture against the float model's; frechet by what it compares.
    """

    outputs: Mapping[float, Output]
    seed: int | None = None
    guidance_scale: float | None = None
    drift: tuple[tuple[float, float], ...] = ()
    psnr_db: tuple[float, ...] = ()
    ssim: tuple[float, ...] = ()
    lpips: tuple[float, ...] = ()
    frechet: Mapping[str, float] = field(default_factory=dict)

    def numbers(self) -> dict[str, float]:
        """One number for everything that was measured: the mean over timesteps or pictures, the last drift."""
        outputs = list(self.outputs.values())
        apart = len(outputs) >= 2 * ENDS
        found = {
            "output_db": _mean(o.sqnr_db for o in outputs),
            "first_db": _mean(o.sqnr_db for o in outputs[:ENDS]) if apart else None,
            "last_db": _mean(o.sqnr_db for o in outputs[-ENDS:]) if apart else None,
            "gain": _mean(o.gain for o in outputs),
            "difference_db": _mean(o.difference_db for o in outputs),
            "guided_db": _mean(o.guided_db for o in outputs),
            "drift": self.drift[-1][1] if self.drift else None,
            "psnr_db": _mean(self.psnr_db),
            "ssim": _mean(self.ssim),
            "lpips": _mean(self.lpips),
            **{f"frechet_{sets}": distance for sets, distance in self.frechet.items()},
        }
        return {name: value for name, value in found.items() if value is not None}

    def to_data(self) -> dict[str, object]:
        """The same as plain values."""
        rows = [{"timestep": time, **asdict(output)} for time, output in self.outputs.items()]
        drift = [{"timestep": time, "distance": distance} for time, distance in self.drift]
        lists = {name: list(getattr(self, name)) for name in ("psnr_db", "ssim", "lpips")}
        about = {"seed": self.seed, "guidance_scale": self.guidance_scale}
        return {**about, "timesteps": rows, "drift": drift, **lists, "frechet": dict(self.frechet)}


@dataclass(frozen=True)
class Spread:
    """Mean of one number over runs and its sample standard deviation, None for a single run.

    Example:
        >>> Spread.of([1.0, 3.0])
        Spread(mean=2.0, deviation=1.4142135623730951)
    """

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value; infinite ones count only if there is nothing else."""
        lossy = [value for value in values if value != math.inf] or list(values)
        mean = sum(lossy) / len(lossy)
        if len(lossy) < 2:
            return cls(mean, None)
        return cls(mean, math.sqrt(sum((value - mean) ** 2 for value in lossy) / (len(lossy) - 1)))


@dataclass(frozen=True)
class Evaluation:
    """How near a compiled UNet is to its float model: a run for each seed or recording, and how they were made."""

    runs: tuple[Run, ...]
    protocol: Mapping[str, Json] = field(default_factory=dict)

    @property
    def output_db(self) -> dict[float, float]:
        """SQNR of the output in dB by timestep, the mean over runs."""
        times = sorted({time for run in self.runs for time in run.outputs}, reverse=True)
        return {t: mean_db([run.outputs[t].sqnr_db for run in self.runs if t in run.outputs]) for t in times}

    @property
    def mean_output_db(self) -> float:
        """The mean SQNR of the output over timesteps and runs."""
        return self.summary()["output_db"].mean

    @property
    def image_db(self) -> tuple[float, ...]:
        """PSNR of every picture of every run."""
        return tuple(db for run in self.runs for db in run.psnr_db)

    @property
    def mean_image_db(self) -> float | None:
        """The mean PSNR of the pictures, or None without pictures."""
        return self.mean("psnr_db")

    def mean(self, name: str) -> float | None:
        """The mean over runs of one of Run.numbers, or None if it was not measured."""
        found = self.summary().get(name)
        return None if found is None else found.mean

    def summary(self) -> dict[str, Spread]:
        """Mean and deviation over runs of Run.numbers."""
        rows = [run.numbers() for run in self.runs]
        names = dict.fromkeys(name for row in rows for name in row)
        return {name: Spread.of([row[name] for row in rows if name in row]) for name in names}

    def misses(
        self, *, sqnr_db: float | None = None, psnr_db: float | None = None, ssim: float | None = None
    ) -> list[str]:
        """The floors that are not reached, in words; nan reaches none."""
        floors = (
            ("output_db", sqnr_db, "the output has {:.1f} dB SQNR, {:g} dB are wanted", ""),
            ("psnr_db", psnr_db, "the pictures have {:.1f} dB PSNR, {:g} dB are wanted", "{:g} dB PSNR"),
            ("ssim", ssim, "the pictures have an SSIM of {:.3f}, {:g} is wanted", "an SSIM of {:g}"),
        )
        found = list[str]()
        for name, floor, missed, wanted in floors:
            value = self.mean(name)
            if floor is not None and value is None:
                lack = "the pictures are too small" if self.image_db else "there are no pictures"
                found.append(f"{lack}, and {wanted.format(floor)} of them are wanted")
            elif floor is not None and value is not None and not value >= floor:
                found.append(missed.format(value, floor))
        return found

    def to_data(self) -> dict[str, object]:
        """The same as plain values."""
        return {
            "output_db": {repr(float(t)).removesuffix(".0"): db for t, db in self.output_db.items()},
            "image_db": list(self.image_db),
            "mean_output_db": self.mean_output_db,
            "mean_image_db": self.mean_image_db,
            "summary": {name: asdict(spread) for name, spread in self.summary().items()},
            "runs": [run.to_data() for run in self.runs],
            "protocol": dict(self.protocol),
        }

    def __str__(self) -> str:
        from dmqfx.judging import tables  # which writes Evaluations

        return tables.written(self)


def mean_db(values: Sequence[float]) -> float:
    """The mean of what differs at all; inf if nothing does, nan for no values."""
    return Spread.of(values).mean if values else math.nan


def _mean(values: Iterable[float | None]) -> float | None:
    """The mean of those that were measured, if any were."""
    measured = [value for value in values if value is not None]
    return mean_db(measured) if measured else None
