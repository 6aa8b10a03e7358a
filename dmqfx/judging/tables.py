"""An evaluation for people: a table by timestep, a table of means, and under what protocol."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Final

from dmqfx.judging.findings import Evaluation, mean_db
from dmqfx.judging.outputs import Output
from dmqfx.seeing import wording

__all__ = ["NAMES", "written"]

NAMES: Final[Mapping[str, tuple[str, int]]] = MappingProxyType(
    {
        "output_db": ("output SQNR, dB", 1),
        "first_db": ("  the first five timesteps", 1),
        "last_db": ("  the last five timesteps", 1),
        "gain": ("output gain", 4),
        "difference_db": ("SQNR of cond - uncond, dB", 1),
        "guided_db": ("SQNR of the guided output, dB", 1),
        "drift": ("drift after the last step", 4),
        "psnr_db": ("picture PSNR, dB", 1),
        "ssim": ("picture SSIM", 4),
        "lpips": ("picture LPIPS", 4),
        "frechet_to_float": ("Fréchet distance to the float pictures", 5),
        "frechet_to_reference": ("Fréchet distance to the reference", 5),
        "frechet_of_float_to_reference": ("  and of the float pictures to it", 5),
    }
)
"""What Run.numbers are called, and how many decimals they are written with."""

_COLUMNS: Sequence[tuple[str, int, Callable[[Output], float | None]]] = (
    ("output SQNR dB", 1, lambda o: o.sqnr_db),
    ("gain", 4, lambda o: o.gain),
    ("cond - uncond dB", 1, lambda o: o.difference_db),
    ("guided dB", 1, lambda o: o.guided_db),
)


def written(evaluation: Evaluation) -> str:
    """All of it, the mean over runs in every cell."""
    return "\n\n".join([_by_timestep(evaluation), _means(evaluation), *_remarks(evaluation)])


def _by_timestep(evaluation: Evaluation) -> str:
    rows = [["timestep", *(name for name, _, _ in _COLUMNS), "drift"]]
    drifts = [dict(run.drift) for run in evaluation.runs]  # of several calls at a timestep, the last one's
    for time in sorted({*evaluation.output_db}.union(*drifts), reverse=True):
        found = [run.outputs[time] for run in evaluation.runs if time in run.outputs]
        cells = [_cell([pick(output) for output in found], decimals) for _, decimals, pick in _COLUMNS]
        rows.append([f"{time:g}", *cells, _cell([drift.get(time) for drift in drifts], 4)])
    kept = [k for k in range(len(rows[0])) if any(row[k] for row in rows[1:])]
    return wording.columns([[row[k] for k in kept] for row in rows], right=range(len(kept)))


def _means(evaluation: Evaluation) -> str:
    rows = [["", "mean", "deviation over runs", "worst picture"]]
    worst = {"psnr_db": min, "ssim": min, "lpips": max}
    for name, spread in evaluation.summary().items():
        words, decimals = NAMES[name]
        pictures = [value for run in evaluation.runs for value in getattr(run, name)] if name in worst else []
        broken = any(map(math.isnan, pictures))  # worse than any number, which min and max do not know
        extreme = f"{math.nan if broken else worst[name](pictures):.{decimals}f}" if pictures else ""
        deviation = "" if spread.deviation is None else f"{spread.deviation:.{decimals + 1}f}"
        rows.append([words, f"{spread.mean:.{decimals}f}", deviation, extreme])
    kept = [k for k in range(4) if any(row[k] for row in rows[1:])]
    return wording.columns([[row[k] for k in kept] for row in rows], right=range(1, 4))


def _remarks(evaluation: Evaluation) -> Iterator[str]:
    """How it was made, in a line or two."""
    told, many = evaluation.protocol, len(evaluation.runs) > 1
    about, lines = [f"{len(evaluation.runs)} run{'s' * many}"], list[str]()
    if "scheduler" in told:
        about += [f"{told['pictures_per_run']} pictures each", f"{told['scheduler']}, {_length(evaluation)}"]
        if any(run.frechet for run in evaluation.runs):
            lines.append(f"Fréchet distances in the features {told['features']}")
        lines.append(f"LPIPS: {told['lpips']}")
    guided = {run.guidance_scale for run in evaluation.runs if "guided_db" in run.numbers()}
    about += [f"guided at {scale:g}" for scale in guided - {None}]
    yield "\n".join([", ".join(about), *lines])


def _length(evaluation: Evaluation) -> str:
    """Of the schedule: the steps that were asked for, and the calls where these are others."""
    calls, settings = len(evaluation.runs[0].drift), evaluation.protocol.get("settings")
    steps = settings.get("steps") if isinstance(settings, Mapping) else None
    if steps is None:
        return f"{calls} calls"
    return f"{steps} steps" + f" in {calls} calls" * (steps != calls)


def _cell(values: Sequence[float | None], decimals: int) -> str:
    measured = [value for value in values if value is not None]
    return f"{mean_db(measured):.{decimals}f}" if measured else ""
