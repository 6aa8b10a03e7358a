"""What one call of a graph did, to be done again for inputs laid out alike: rows of native calls, and calls of torch."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, NamedTuple

from torch import Tensor

from dmqfx.runtime.kernels.native import Library, Step

__all__ = ["Call", "FailedError", "Replay", "Row", "Slot", "filled", "given", "layout", "slots", "tensors"]


class FailedError(Exception):
    """A kernel did not run, or torch laid out a result in another way: the graph has to be run."""


class Slot(NamedTuple):
    """A value that is another tensor in every call."""

    number: int


class Row:
    """Native calls one behind the other, and where tensors that are others in every call are pointed to."""

    def __init__(self, native: Library) -> None:
        self.native, self.calls = native, list[ctypes.Structure]()
        self.patches: list[tuple[ctypes.Structure, str, int, int]] = []
        self.dead: list[int] = []
        self._steps: ctypes.Array[Step] | None = None

    def reads(self) -> Iterator[int]:
        return (slot for _, _, slot, _ in self.patches)

    def __call__(self, values: list[Any]) -> None:
        if self._steps is None:
            self._steps = self.native.steps(self.calls)
        starts: dict[int, int] = {}
        for structure, name, slot, offset in self.patches:
            start = starts.get(slot)
            if start is None:
                start = starts[slot] = values[slot].untyped_storage().data_ptr()
            setattr(structure, name, start + offset)
        if not self.native.run_all(self._steps):
            raise FailedError


@dataclass(eq=False)
class Call:
    """One call of torch."""

    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    made: int
    layouts: list[object]  # of its results, on which what reads them relies
    dead: list[int] = field(default_factory=list)

    def reads(self) -> Iterator[int]:
        return slots((self.args, self.kwargs))

    def __call__(self, values: list[Any]) -> None:
        made = values[self.made] = self.target(*filled(self.args, values), **filled(self.kwargs, values))
        if list(map(layout, tensors(made))) != self.layouts:
            raise FailedError


@dataclass(eq=False)
class Replay:
    """What one call of a graph did, to be done again; `held` is what the kernels' structures point to."""

    steps: list[Row | Call]
    slots: int
    result: Any
    held: tuple[object, ...]
    size: int
    lock: Lock = field(default_factory=Lock)

    def __call__(self, reads: Sequence[object]) -> Any:
        values: list[Any] = [*reads, *([None] * (self.slots - len(reads)))]
        for step in self.steps:
            step(values)
            for slot in step.dead:
                values[slot] = None
        return given(self.result, values)


def layout(x: Tensor) -> tuple[object, ...]:
    """Where the numbers of a tensor lie in its memory."""
    return x.dtype, x.shape, x.stride(), x.storage_offset()


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (tuple, list)) and not isinstance(value, Slot):
        for each in value:
            yield from _leaves(each)
    elif isinstance(value, dict):
        yield from _leaves(list(value.values()))
    else:
        yield value


def tensors(value: Any) -> Iterator[Tensor]:
    return (each for each in _leaves(value) if isinstance(each, Tensor))


def slots(value: Any) -> Iterator[int]:
    return (each.number for each in _leaves(value) if isinstance(each, Slot))


def filled(value: Any, values: Sequence[Any]) -> Any:
    """With what is in the slots."""
    if isinstance(value, Slot):
        return values[value.number]
    if isinstance(value, (tuple, list)):
        return type(value)(filled(each, values) for each in value)
    return {name: filled(each, values) for name, each in value.items()} if isinstance(value, dict) else value


def given(result: Any, values: Sequence[Any]) -> Any:
    """A result for the caller: nothing that the next call will write into."""
    if isinstance(result, Tensor):
        return result.clone()
    if isinstance(result, (tuple, list)) and not isinstance(result, Slot):
        return type(result)(given(each, values) for each in result)
    if isinstance(result, dict):
        return {name: given(each, values) for name, each in result.items()}
    return filled(result, values)
