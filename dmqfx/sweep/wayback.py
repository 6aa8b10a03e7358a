"""How much memory automatic differentiation holds on to until the way back, and the most that work takes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Peak", "Remembered", "remembered"]


@dataclass
class Remembered:
    """Units: bytes."""

    nbytes: int = 0


@contextmanager
def remembered() -> Iterator[Remembered]:
    """Counts what operations keep for their way back, each piece of memory once."""
    found, seen = Remembered(), set[int]()

    def keep(x: Tensor) -> Tensor:
        memory = x.untyped_storage()
        if memory.data_ptr() not in seen:
            seen.add(memory.data_ptr())
            found.nbytes += memory.nbytes()
        return x.detach()

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        yield found


class Peak(TorchDispatchMode):
    """Counts the tensors that operations make, forward and back, for as long as each lives.

    What an operation works with on its way, and lets go, is not seen.

    Units: nbytes, the most that lived at once.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types for it
        self.nbytes, self._now = 0, 0
        self._living = set[int]()

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Compute as ever; storage that nobody had before is new."""
        had = {memory._cdata for memory in _storages((args, kwargs))}
        found = func(*args, **(kwargs or {}))
        for memory in _storages(found):
            if memory._cdata not in had and memory._cdata not in self._living:
                self._living.add(memory._cdata)
                self._now += memory.nbytes()
                weakref.finalize(memory, self._gone, memory._cdata, memory.nbytes())
        self.nbytes = max(self.nbytes, self._now)
        return found

    def _gone(self, memory: int, nbytes: int) -> None:
        self._living.remove(memory)
        self._now -= nbytes


def _storages(values: object) -> Iterator[torch.UntypedStorage]:
    return (each.untyped_storage() for each in tree_leaves(values) if isinstance(each, Tensor))
