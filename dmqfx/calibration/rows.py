"""Rows of recorded tensors. A context that is the same at every step is stored once, not once per step."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch
from torch import Tensor

Key: TypeAlias = tuple[tuple[tuple[str, tuple[int, ...], torch.dtype], ...], tuple[tuple[str, float], ...]]


@dataclass(frozen=True, eq=False)
class Column:
    """One input of every row: row i holds values[index[i]].

    Shapes: values [U, ...] the distinct values; index int64 [N], one entry per row.
    Raises: ValueError if the index points beside the values.
    """

    values: Tensor
    index: Tensor

    def __post_init__(self) -> None:
        if self.index.dtype != torch.int64 or self.index.dim() != 1 or self.values.dim() == 0:
            raise ValueError("a column is a tensor of values and an int64 vector of their numbers")
        if len(self.index) and not 0 <= int(self.index.min()) <= int(self.index.max()) < len(self.values):
            raise ValueError(f"the index points beside the {len(self.values)} values")

    def __len__(self) -> int:
        return len(self.index)

    def rows(self, at: Tensor | slice) -> Tensor:
        """The values of some rows, stacked."""
        return self.values[self.index[at]]

    def take(self, at: Tensor) -> Column:
        """A column of these rows only, without the values that no row needs."""
        used, index = torch.unique(self.index[at], return_inverse=True)
        return Column(self.values[used], index)

    def then(self, other: Column) -> Column:
        """The rows of another column behind these."""
        values = torch.cat([self.values, other.values])
        return Column(values, torch.cat([self.index, other.index + len(self.values)]))


@dataclass(frozen=True, eq=False)
class Rows:
    """Recorded rows of equal names, shapes and dtypes; `scalars` are inputs that have no batch dim.

    Shapes: every column N rows; trajectory, step int64 [N].
    Raises: ValueError if the lengths differ.
    """

    columns: Mapping[str, Column]
    trajectory: Tensor
    step: Tensor
    scalars: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        lengths = {len(column) for column in self.columns.values()} | {len(self.trajectory), len(self.step)}
        if len(lengths) != 1:
            raise ValueError(f"columns of different lengths: {sorted(lengths)}")

    def __len__(self) -> int:
        return len(self.step)

    @property
    def key(self) -> Key:
        """What rows of one group have in common: names, shapes of one row, dtypes, and the scalars."""
        columns = ((n, tuple(c.values.shape[1:]), c.values.dtype) for n, c in self.columns.items())
        return tuple(columns), tuple(self.scalars.items())

    def tensors(self, at: Tensor | slice) -> dict[str, Tensor]:
        """Some rows as batched tensors, and the scalars."""
        columns = {name: column.rows(at) for name, column in self.columns.items()}
        return columns | {name: torch.tensor(value) for name, value in self.scalars.items()}

    def take(self, at: Tensor) -> Rows:
        """These rows only."""
        columns = {name: column.take(at) for name, column in self.columns.items()}
        return replace(self, columns=columns, trajectory=self.trajectory[at], step=self.step[at])

    def then(self, other: Rows) -> Rows:
        """The rows of another group of the same key behind these."""
        columns = {name: column.then(other.columns[name]) for name, column in self.columns.items()}
        trajectory = torch.cat([self.trajectory, other.trajectory])
        return replace(self, columns=columns, trajectory=trajectory, step=torch.cat([self.step, other.step]))


def joined(groups: Iterable[Rows]) -> tuple[Rows, ...]:
    """Groups of one key made one, in order of first appearance."""
    found: dict[Key, Rows] = {}
    for group in groups:
        found[group.key] = found[group.key].then(group) if group.key in found else group
    return tuple(found.values())


class RowsWriter:
    """Collects rows of one key, keeping each distinct value once."""

    def __init__(self, scalars: Mapping[str, float]) -> None:
        self._scalars = dict(scalars)
        self._seen: dict[str, dict[bytes, int]] = {}
        self._values: dict[str, list[Tensor]] = {}
        self._index: dict[str, list[int]] = {}
        self._trajectory: list[int] = []
        self._step: list[int] = []

    def add(self, batch: Mapping[str, Tensor], trajectories: Sequence[int], step: int) -> None:
        """Append the rows of a batch of tensors that share their first dim, copied."""
        for name, tensor in batch.items():
            for row in tensor.contiguous().unbind():
                self._index.setdefault(name, []).append(self._number(name, row))
        self._trajectory.extend(trajectories)
        self._step.extend([step] * len(trajectories))

    def rows(self) -> Rows:
        """What was collected so far."""
        columns = {n: Column(torch.stack(self._values[n]), torch.tensor(i)) for n, i in self._index.items()}
        return Rows(columns, torch.tensor(self._trajectory), torch.tensor(self._step), self._scalars)

    def _number(self, name: str, row: Tensor) -> int:
        data = row.reshape(-1).view(torch.uint8).numpy()
        digest = hashlib.blake2b(data, digest_size=16).digest()
        seen = self._seen.setdefault(name, {})
        if digest not in seen:
            seen[digest] = len(seen)
            self._values.setdefault(name, []).append(row.clone())
        return seen[digest]


def stratified(timesteps: Tensor, rows: int, generator: torch.Generator) -> Tensor:
    """Numbers of random rows, in order: one row of every timestep, then a second, …

    The last round, for which there is no room in full, is spread evenly over time.
    """
    shuffled = torch.randperm(len(timesteps), generator=generator)
    order = shuffled[torch.argsort(timesteps[shuffled], stable=True)].tolist()
    met: Counter[float] = Counter()
    rounds: dict[int, list[int]] = {}
    for row in order:
        time = float(timesteps[row])
        rounds.setdefault(met[time], []).append(row)
        met[time] += 1
    chosen: list[int] = []
    for number in sorted(rounds):
        candidates, wanted = rounds[number], min(rows - len(chosen), len(rounds[number]))
        offset = float(torch.rand((), generator=generator))
        chosen += [candidates[int((k + offset) * len(candidates) / wanted)] for k in range(wanted)]
    return torch.tensor(sorted(chosen), dtype=torch.int64)
