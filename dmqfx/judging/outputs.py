"""The UNet's output along recorded trajectories: float beside compiled, also as guidance combines it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

from dmqfx.calibration.calibration import Calibration
from dmqfx.calibration.rows import Rows, stratified
from dmqfx.frontend.capture import Canonical, evaluating
from dmqfx.frontend.signature import UNet
from dmqfx.runtime.unet import CompiledUNet
from dmqfx.seeing.lockstep import Ratio

__all__ = ["Output", "compare_outputs", "guided_pairs"]

_BATCH = 4  # even: the two rows of a guided pair are never torn apart


@dataclass(frozen=True)
class Output:
    """How near the output is to the float one at one timestep, over all rows of it.

    Let f be the float output, q the compiled one, c and u those of a guided pair with its prompt and without.
    Units: sqnr_db is 10 log10(|f|^2 / |f - q|^2); gain is <q, f> / <f, f>, 1 where nothing shrinks;
    difference_db is the SQNR of c - u and guided_db that of u + s (c - u). None where there is no pair or no
    scale s; inf where nothing differs.
    """

    sqnr_db: float
    gain: float
    difference_db: float | None = None
    guided_db: float | None = None


@dataclass
class Likeness(Ratio):
    """A ratio that also knows how much of the signal is left in its approximation."""

    product: float = 0.0

    def add(self, right: Tensor, approximate: Tensor) -> None:
        """Count two tensors of one shape."""
        super().add(right, approximate)
        self.product += float((right.double() * approximate.double()).sum())

    @property
    def gain(self) -> float:
        """The factor of the signal in the approximation; nan for no signal."""
        return self.product / self.signal if self.signal else float("nan")


@dataclass
class _Tally:
    """What was counted at one timestep."""

    output: Likeness = field(default_factory=Likeness)
    difference: Ratio = field(default_factory=Ratio)
    guided: Ratio = field(default_factory=Ratio)
    pairs: int = 0

    def add_pair(self, exact: Tensor, approximate: Tensor, scale: float | None) -> None:
        """Count a guided pair. Shapes: [2, ...], the unconditional row first."""
        self.pairs += 1
        (without, given), (without_q, given_q) = exact.double(), approximate.double()
        self.difference.add(given - without, given_q - without_q)
        if scale is not None:
            self.guided.add(without + scale * (given - without), without_q + scale * (given_q - without_q))

    def found(self, scale: float | None) -> Output:
        """The numbers of this timestep."""
        difference = self.difference.db if self.pairs else None
        guided = self.guided.db if self.pairs and scale is not None else None
        return Output(self.output.db, self.output.gain, difference, guided)


def compare_outputs(
    unet: UNet,
    compiled: CompiledUNet,
    calibration: Calibration,
    *,
    rows: int | None = None,
    guidance_scale: float | None = None,
    progress: bool = False,
) -> dict[float, Output]:
    """The outputs of both on the same recorded calls, by timestep from the first to the last.

    Units: rows is how many calls, at least one of every timestep; None is all of them.
    Raises: CalibrationError if the recorded calls do not fit the model.
    """
    spec = compiled.program.inputs
    calibration.check(spec)
    exact = Canonical(unet, tuple(i.name for i in spec.inputs))
    chosen = list(_chosen(calibration, rows))
    tallies: dict[float, _Tally] = {}
    with (
        evaluating(unet),
        torch.no_grad(),
        tqdm(total=sum(len(g) for g, _ in chosen), desc="evaluate", unit="row", disable=not progress) as bar,
    ):
        for group, paired in chosen:
            for batch in Calibration((group,)).batches(_BATCH, spec, dtype=unet.dtype):
                right = exact(*(batch[i.name].to(unet.device) for i in spec.inputs))
                result = compiled.runner(
                    **{i.name: batch[i.name].to(compiled.device, i.dtype) for i in spec.inputs}
                )
                approximate = result if isinstance(result, tuple) else (result,)
                times = batch["timestep"].tolist()
                for a, b in zip(right, approximate, strict=True):
                    _count(tallies, times, a.cpu(), b.cpu(), paired, guidance_scale)
                paired = max(paired - len(times), 0)
                bar.update(len(times))
    return {time: tallies[time].found(guidance_scale) for time in sorted(tallies, reverse=True)}


def guided_pairs(rows: Rows) -> Tensor:
    """Rows that are the two halves of a guided batch: the same samples at every step, another condition.

    Two trajectories that share all their samples are a pair; the first in the batch is the unconditional one,
    as in diffusers. Three or more that share them are not: which two guidance combines is not known.

    Shapes: int64 [pairs, 2].
    """
    trajectories: dict[int, list[int]] = {}
    for row in torch.argsort(rows.step, stable=True).tolist():
        trajectories.setdefault(int(rows.trajectory[row]), []).append(row)
    sample, time = rows.columns["sample"].index, rows.columns["timestep"].rows(slice(None))
    alike: dict[tuple[tuple[int, float], ...], list[list[int]]] = {}
    for _, path in sorted(trajectories.items()):
        alike.setdefault(tuple((int(sample[row]), float(time[row])) for row in path), []).append(path)
    pairs = [
        (first, second)
        for paths in alike.values()
        if len(paths) == 2
        for first, second in zip(*paths, strict=True)
        if any(column.index[first] != column.index[second] for column in rows.columns.values())
    ]
    return torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)


def _count(
    tallies: dict[float, _Tally],
    times: list[float],
    exact: Tensor,
    approximate: Tensor,
    paired: int,
    scale: float | None,
) -> None:
    """Count a batch whose first `paired` rows are guided pairs, side by side."""
    for k, time in enumerate(times):
        tally = tallies.setdefault(time, _Tally())
        tally.output.add(exact[k], approximate[k])
        if k % 2 and k < paired:
            tally.add_pair(exact[k - 1 : k + 1], approximate[k - 1 : k + 1], scale)


def _chosen(calibration: Calibration, wanted: int | None) -> Iterator[tuple[Rows, int]]:
    """Random rows of every group, timesteps alike, pairs first and whole; and how many rows are paired."""
    units = [unit for number, group in enumerate(calibration.groups) for unit in _units(number, group)]
    if wanted is not None and wanted < len(calibration):
        times = torch.tensor([unit.time for unit in units])
        count = max(wanted * len(units) // len(calibration), len({unit.time for unit in units}))
        units = [units[k] for k in stratified(times, count, torch.Generator().manual_seed(0)).tolist()]
    for number, group in enumerate(calibration.groups):
        inside = [unit.rows for unit in units if unit.group == number]
        if inside:
            pairs = [row for rows in inside if len(rows) == 2 for row in rows]
            single = [row for rows in inside if len(rows) == 1 for row in rows]
            yield group.take(torch.tensor(pairs + single)), len(pairs)


@dataclass(frozen=True)
class _Unit:
    """What must stay together: a pair, or a row that has none."""

    group: int
    rows: tuple[int, ...]
    time: float


def _units(number: int, group: Rows) -> Iterator[_Unit]:
    times = group.columns["timestep"].rows(slice(None)).tolist()
    pairs = guided_pairs(group).tolist()
    alone = sorted(set(range(len(group))) - {row for pair in pairs for row in pair})
    for rows in (*pairs, *([row] for row in alone)):
        yield _Unit(number, tuple(rows), times[rows[0]])
