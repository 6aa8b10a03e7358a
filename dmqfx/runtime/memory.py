"""Memory of results, by the content of what they were computed from: never by which tensor that was in."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from threading import Lock

from torch import Tensor, nn

from dmqfx.numbers.packing import raw

__all__ = ["LIMIT", "Constants", "Memory", "Weights", "content"]

LIMIT = 128 * 2**20
"""Bytes that one program may keep: the keys and values of SDXL for one guided picture, or those of SD1.5 for eight."""
_ENTRY = 1024  # bytes that an entry costs beside its tensors, about

Values = tuple[Tensor, ...]


def content(value: object) -> Hashable:
    """All that can make a difference to what is computed from a value: every bit of a tensor, and its layout.

    Bits, not numbers: 0.0 and -0.0 are two, and nan is itself.
    """
    if not isinstance(value, Tensor):
        return value if isinstance(value, Hashable) else repr(value)
    return value.dtype, value.shape, value.stride(), raw(value).numpy().tobytes()


class Memory:
    """Results by key; beyond `limit` bytes the least recently used are forgotten.

    Threads may share one. A copy starts empty, and so does one that was pickled.

    Example:
        >>> import torch
        >>> memory = Memory(limit=10_000)
        >>> for k in range(9):
        ...     memory.keep(k, (torch.zeros(1000),))
        >>> len(memory), memory.recall(0), len(memory.recall(8))
        (1, None, 1)
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit, self.size = limit, 0
        self._held: OrderedDict[Hashable, tuple[Values, int]] = OrderedDict()
        self._lock = Lock()

    def recall(self, key: Hashable) -> Values | None:
        """What was kept under a key, if it still is."""
        with self._lock:
            if key not in self._held:
                return None
            self._held.move_to_end(key)
            return self._held[key][0]

    def keep(self, key: Hashable, values: Sequence[Tensor]) -> None:
        """Keep values, which nobody may write into from now on; what exceeds the limit alone is not kept."""
        size = _ENTRY + _bytes(key) + sum(value.untyped_storage().nbytes() for value in values)
        if size > self.limit:
            return
        with self._lock:
            self.size += size - self._held.pop(key, ((), 0))[1]
            self._held[key] = tuple(values), size
            while self.size > self.limit:
                _, (_, freed) = self._held.popitem(last=False)
                self.size -= freed

    def __len__(self) -> int:
        return len(self._held)

    def __reduce__(self) -> tuple[type[Memory], tuple[int]]:
        return Memory, (self.limit,)


def _bytes(key: object) -> int:
    if isinstance(key, bytes):
        return len(key)
    return sum(map(_bytes, key)) if isinstance(key, tuple) else 0


class Constants:
    """Constants of a module, found once; a submodule that is replaced is noticed."""

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        self._module, self._names = module, tuple(names)
        self._find()

    def __call__(self) -> list[Tensor]:
        """As they are now."""
        if any(children.get(name) is not child for children, name, child in self._links):
            self._find()
        try:
            return [holder[name] for holder, name in self._slots]
        except KeyError:  # a buffer became a parameter
            self._find()
            return [holder[name] for holder, name in self._slots]

    def _find(self) -> None:
        self._slots = [_slot(self._module, name) for name in self._names]
        paths = {path for name in self._names for path in _above(name)}
        whole = {path: path.rpartition(".") for path in paths}
        self._links = [
            (self._module.get_submodule(parent)._modules, last, self._module.get_submodule(path))
            for path, (parent, _, last) in whole.items()
        ]

    def __reduce__(self) -> tuple[type[Constants], tuple[nn.Module, tuple[str, ...]]]:
        return Constants, (nn.Module(), ())


def _above(name: str) -> Iterator[str]:
    """The modules that a constant lies in: "a" and "a.b" of "a.b.c"."""
    parts = name.split(".")[:-1]
    return (".".join(parts[: k + 1]) for k in range(len(parts)))


class Weights:
    """Constants of a module, looked at for whether somebody replaced one or wrote into it.

    What is written through `.data`, or with numpy, torch does not count, and it is not noticed.
    """

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        self._constants = Constants(module, names)
        self._tensors: list[Tensor] = []
        self._stamp: list[tuple[int, int]] = []
        self._generation = 0
        self._lock = Lock()

    def generation(self) -> int | None:
        """A number that is another one whenever a weight is; None if weights are learned, or changes not counted."""
        tensors = self._constants()
        if any(each.requires_grad or each.is_inference() for each in tensors):
            return None
        stamp = [(each._version, each.data_ptr()) for each in tensors]
        with self._lock:
            same = len(tensors) == len(self._tensors) and all(map(_is, tensors, self._tensors))
            if not same or stamp != self._stamp:
                self._tensors, self._stamp = tensors, stamp
                self._generation += 1
            return self._generation

    def __reduce__(self) -> tuple[type[Weights], tuple[nn.Module, tuple[str, ...]]]:
        return Weights, (nn.Module(), ())


def _is(a: Tensor, b: Tensor) -> bool:
    return a is b


def _slot(module: nn.Module, name: str) -> tuple[dict[str, Tensor], str]:
    """Where a module holds a constant: it may be replaced there."""
    path, _, last = name.rpartition(".")
    owner = module.get_submodule(path)
    held: dict[str, Tensor] = owner._parameters if last in owner._parameters else owner._buffers  # type: ignore[assignment]  # a constant is never None
    return held, last
