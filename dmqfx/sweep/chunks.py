"""Calibration rows in chunks: what a sweep computes at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from dmqfx import processes
from dmqfx.calibration.calibration import Calibration
from dmqfx.calibration.rows import Rows
from dmqfx.graph.program import Program

__all__ = ["Chunk", "chunked", "held_out", "mixed", "own_rows", "shared"]

_Batch = TypeVar("_Batch")
_FEWEST = 3  # samples of which one may be held out


@dataclass(frozen=True, eq=False)
class Chunk:
    """A batch of calibration rows of equal shapes; the first of them has the number `first`.

    `recorded` are the numbers that the rows have in the calibration, where they have others than those that follow.

    Shapes: inputs by placeholder name; timestep [B].
    """

    inputs: Mapping[str, Tensor]
    timestep: Tensor
    first: int
    recorded: Sequence[int] = ()

    @property
    def numbers(self) -> Sequence[int]:
        """The rows' numbers in the calibration."""
        return self.recorded or range(self.first, self.first + len(self.timestep))

    def part(self, rows: slice) -> Chunk:
        """Some of the rows; an input that is one number for all goes with them."""
        inputs = {name: value[rows] if value.dim() else value for name, value in self.inputs.items()}
        numbers = self.numbers[rows]
        return Chunk(inputs, self.timestep[rows], numbers[0] if numbers else self.first, numbers)


def chunked(data: Calibration, program: Program, size: int) -> Iterator[Chunk]:
    """The rows in their order, at most `size` at a time, on the program's device."""
    timesteps, device, first = data.timesteps(), program.device, 0
    for batch in data.batches(size, program.inputs, dtype=program.dtype):
        inputs = {name: value.to(device) for name, value in batch.items()}
        rows = len(batch["sample"])
        yield Chunk(inputs, timesteps[first : first + rows].to(device), first)
        first += rows


def mixed(
    data: Calibration,
    program: Program,
    rows: int,
    size: int,
    generator: torch.Generator,
    among: Tensor | None = None,
) -> list[Chunk]:
    """At most so many rows to learn from, in random order, so that every batch has all sorts of timesteps.

    Shapes: among int64 [n], numbers of the rows to choose from; all, unless said.
    """
    chosen = _numbered(data, among).select(rows, generator)
    groups = (group.take(torch.randperm(len(group), generator=generator)) for group in chosen.groups)
    return _in_batches(replace(chosen, groups=tuple(groups)), program, size)


def held_out(data: Calibration, parts: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Numbers of the rows to learn from, and of those to judge by: one in so many samples drawn, and at least one.

    A sample is drawn by a trajectory, or by the two of a guided pair, which share their latents. With fewer than
    three samples all rows are to learn from.

    Shapes: int64 [n] each, in order.
    """
    drawn = torch.cat(
        [torch.empty(0, 2, dtype=torch.int64), *map(_drawn, range(len(data.groups)), data.groups)]
    )
    known, own = torch.unique(drawn, dim=0, return_inverse=True)
    if len(known) < _FEWEST:
        return torch.arange(len(own)), torch.empty(0, dtype=torch.int64)
    judges = torch.randperm(len(known), generator=generator)[: max(1, len(known) // parts)]
    judging = torch.isin(own, judges)
    return (~judging).nonzero()[:, 0], judging.nonzero()[:, 0]


def _drawn(k: int, group: Rows) -> Tensor:
    """Which sample each row of the k-th group belongs to: the latent at the last step of its trajectory.

    Shapes: int64 [rows, 2].
    """
    last, latents = dict[int, tuple[int, int]](), group.columns["sample"].index.tolist()
    trajectories = group.trajectory.tolist()
    for each, step, latent in zip(trajectories, group.step.tolist(), latents, strict=True):
        last[each] = max(last.get(each, (step, latent)), (step, latent))
    return torch.tensor([(k, last[each][1]) for each in trajectories], dtype=torch.int64)


def _numbered(data: Calibration, among: Tensor | None) -> Calibration:
    """The data with the rows' numbers in place of their steps; some of them, if it is said which."""
    start, groups = 0, list[Rows]()
    for group in data.groups:
        numbers = torch.arange(start, start + len(group))
        inside = torch.arange(len(group)) if among is None else torch.isin(numbers, among).nonzero()[:, 0]
        if len(inside):
            groups.append(replace(group, step=numbers).take(inside))
        start += len(group)
    return replace(data, groups=tuple(groups))


def _in_batches(numbered: Calibration, program: Program, size: int) -> list[Chunk]:
    numbers = numbered.steps().tolist()
    return [
        replace(chunk, recorded=numbers[chunk.first : chunk.first + len(chunk.timestep)])
        for chunk in chunked(numbered, program, size)
    ]


def shared(batches: Iterable[_Batch], data: Calibration, size: int) -> Iterator[_Batch]:
    """Of all batches of so many rows those of this process: whole ones, so that each is computed as by one alone.

    Raises: CalibrationError if there are fewer batches than processes.
    """
    total = sum(-(-len(group) // size) for group in data.groups)
    part = processes.share(total, f"batches of at most {size} calibration rows") if total else range(0)
    return (batch for k, batch in enumerate(batches) if k in part)


def own_rows(data: Calibration) -> int:
    """About how many rows are this process's."""
    return -(-len(data) // processes.count())
