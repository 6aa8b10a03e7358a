"""Calibration rows in chunks: what a sweep computes at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from dmqfx import processes
from dmqfx.calibration.calibration import Calibration
from dmqfx.graph.program import Program

__all__ = ["Chunk", "chunked", "mixed", "own_rows", "shared"]

_Batch = TypeVar("_Batch")


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
    data: Calibration, program: Program, rows: int, size: int, generator: torch.Generator
) -> list[Chunk]:
    """At most so many rows to learn from, in random order, so that every batch has all sorts of timesteps."""
    start, numbered = 0, []
    for group in data.groups:
        numbered.append(replace(group, step=torch.arange(start, start + len(group))))
        start += len(group)
    chosen = replace(data, groups=tuple(numbered)).select(rows, generator)
    groups = (group.take(torch.randperm(len(group), generator=generator)) for group in chosen.groups)
    shuffled = replace(chosen, groups=tuple(groups))
    numbers = shuffled.steps().tolist()
    return [
        replace(chunk, recorded=numbers[chunk.first : chunk.first + len(chunk.timestep)])
        for chunk in chunked(shuffled, program, size)
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
