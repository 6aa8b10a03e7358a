"""Calibration rows in chunks: what a sweep computes at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from dmqfx.calibration.calibration import Calibration
from dmqfx.graph.program import Program

__all__ = ["Chunk", "chunked"]


@dataclass(frozen=True, eq=False)
class Chunk:
    """A batch of calibration rows of equal shapes; the first of them has the number `first`.

    Shapes: inputs by placeholder name; timestep [B].
    """

    inputs: Mapping[str, Tensor]
    timestep: Tensor
    first: int


def chunked(data: Calibration, program: Program, size: int) -> Iterator[Chunk]:
    """The rows in their order, at most `size` at a time, on the program's device."""
    timesteps, device, first = data.timesteps(), program.device, 0
    for batch in data.batches(size, program.inputs, dtype=program.dtype):
        inputs = {name: value.to(device) for name, value in batch.items()}
        rows = len(batch["sample"])
        yield Chunk(inputs, timesteps[first : first + rows].to(device), first)
        first += rows
