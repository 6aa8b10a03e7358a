"""A graph of native kernels again, for inputs laid out as before: in rows of calls without Python between them."""

from __future__ import annotations

import ctypes
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode

from dmqfx.runtime import operators
from dmqfx.runtime.kernels.native import Library, Step, library, taped

__all__ = ["LIMIT", "Replays", "is_native"]

LIMIT = 128 * 2**20
"""Bytes of results between kernels that the replays of one module may keep."""
_MOST = 4  # layouts that a module keeps replays for
_NATIVE: Mapping[object, Callable[..., Tensor]] = {
    getattr(operators.OPS, name).default: function
    for name, function in {
        "kernel_conv2d": operators.kernel_conv2d,
        "kernel_linear": operators.kernel_linear,
        "kernel_quantize": operators.kernel_quantize,
        "kernel_attention": operators.attend,
    }.items()
}
_EMPTY = {
    torch.ops.aten.empty.memory_format, torch.ops.aten.empty_strided.default, torch.ops.aten.empty_like.default,
    torch.ops.aten.new_empty.default, torch.ops.aten.new_empty_strided.default,
}  # fmt: skip


def is_native(node: fx.Node) -> bool:
    """Whether a node calls a kernel that a replay can call."""
    return node.op == "call_function" and node.target in _NATIVE


class UnlikeError(Exception):
    """A graph that does something else than native kernels, views, and operators that write into nothing."""


class FailedError(Exception):
    """A kernel did not run; called by itself it says why."""


class _Slot(NamedTuple):
    """A value that is another tensor in every call."""

    number: int


class _Arena:
    """Blocks of memory that one call after another writes into; one that is given back is taken again."""

    def __init__(self) -> None:
        self.blocks: dict[int, torch.UntypedStorage] = {}
        self._free: list[torch.UntypedStorage] = []

    @property
    def size(self) -> int:
        """Bytes of all blocks."""
        return sum(block.nbytes() for block in self.blocks.values())

    def take(self, like: Tensor) -> Tensor:
        """A tensor of this shape, dtype and layout in a block of its own."""
        need = max(1, like.untyped_storage().nbytes())
        fitting = [block for block in self._free if need <= block.nbytes() <= 2 * need]
        if fitting:
            block = min(reversed(fitting), key=torch.UntypedStorage.nbytes)  # the last used of equal ones
            self._free.remove(block)
        else:
            block = like.untyped_storage()  # nobody else has it
        self.blocks[block.data_ptr()] = block
        return torch.empty(0, dtype=like.dtype).set_(block, 0, like.shape, like.stride())

    def give(self, start: int) -> None:
        """Take back the block that starts there."""
        self._free.append(self.blocks[start])


class _Watch(TorchDispatchMode):
    """Has what a native operator makes room for in the arena, and sees whether it does more than that."""

    def __init__(self, arena: _Arena) -> None:
        super().__init__()
        self.arena, self.taken, self.computes = arena, list[Tensor](), False

    def __torch_dispatch__(
        self, func: Any, types: object, args: Sequence[object] = (), kwargs: Mapping[str, object] | None = None
    ) -> object:
        made = func(*args, **(kwargs or {}))
        if func in _EMPTY:
            self.taken.append(self.arena.take(made))
            return self.taken[-1]
        aliases = [each.alias_info for each in func._schema.returns]
        self.computes |= any(alias is None or alias.is_write for alias in aliases)
        return made


class _Row:
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
class _Call:
    """One call of torch."""

    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    made: int
    dead: list[int] = field(default_factory=list)

    def reads(self) -> Iterator[int]:
        return _slots((self.args, self.kwargs))

    def __call__(self, values: list[Any]) -> None:
        values[self.made] = self.target(*_filled(self.args, values), **_filled(self.kwargs, values))


@dataclass(eq=False)
class _Replay:
    """What one call of a graph did, to be done again; `held` is what the kernels' structures point to."""

    steps: list[_Row | _Call]
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
        return _given(self.result, values)


class _Recorder:
    """One call of a graph, and what it does."""

    def __init__(self, native: Library, reads: Sequence[object], constants: Sequence[Tensor]) -> None:
        self.native, self.constants, self.arena = native, constants, _Arena()
        self.steps: list[_Row | _Call] = []
        self.values: list[Any] = []  # of slots; all live until the end, since pointers are told by where they point to
        self.homes: dict[int, int] = {}  # where a storage of theirs starts, and the first slot there
        self.users: dict[int, int] = {}  # values that lie in a block of the arena
        self.own = {each.untyped_storage().data_ptr() for each in constants}
        for value in reads:
            self._slot(value)
        if self.own & self.homes.keys():
            raise UnlikeError("an input shares memory with a constant")

    def record(self, graph: fx.Graph) -> tuple[_Replay, Any]:
        """Run the graph, whose placeholders are the reads, then the constants: what it did, and its result.

        Raises: UnlikeError for what cannot be done again.
        """
        given = iter([*map(_Slot, range(len(self.values))), *self.constants])
        dying, known = _dying(graph), dict[fx.Node, Any]()
        for node in graph.nodes:
            if node.op == "output":
                result = fx.node.map_arg(node.args[0], known.__getitem__)
                break
            known[node] = next(given) if node.op == "placeholder" else self._run(node, known)
            for start in self._starts(known[node]):
                self.users[start] += 1
            for dead in dying.get(node, ()):
                for start in self._starts(known.pop(dead)):
                    self.users[start] -= 1
                    if self.users[start] == 0:
                        self.arena.give(start)
        return self._replay(result), _given(result, self.values)

    def _run(self, node: fx.Node, known: Mapping[fx.Node, Any]) -> Any:
        target: Any = node.target
        if node.op != "call_function" or (_is_operator(target) and target._schema.is_mutable):
            raise UnlikeError(f"{node.op} {target} may write into what it reads")
        args, kwargs = (fx.node.map_arg(each, known.__getitem__) for each in (node.args, node.kwargs))
        now = _filled(args, self.values), _filled(kwargs, self.values)
        if is_native(node) and (coded := self._native(_NATIVE[target], *now)) is not None:
            return coded
        made = target(*now[0], **now[1])
        starts = [each.untyped_storage().data_ptr() for each in _tensors(made)]
        if not starts and (target is torch.ops.aten.sym_size.int or not any(True for _ in _slots((args, kwargs)))):
            return made  # a number that follows from the layout
        if not any(True for _ in _slots((args, kwargs))) and all(start in self.users or start in self.own for start in starts):
            return made  # a view of what stays where it is
        slot = self._slot(made)
        self.steps.append(_Call(target, args, kwargs, slot.number))
        return slot

    def _native(self, function: Callable[..., Tensor], args: Any, kwargs: Any) -> Tensor | None:
        """What a native operator makes, or None if it does more than call the kernels."""
        with taped() as calls, _Watch(self.arena) as watch:
            made = function(*args, **kwargs)
        stays = made.untyped_storage().data_ptr()
        taken = {each.untyped_storage().data_ptr() for each in watch.taken}
        alike = not watch.computes and stays in taken
        for start in taken - ({stays} if alike else set()):
            self.arena.give(start)
        if not alike:
            return None
        self.users.setdefault(stays, 0)
        row = self.steps[-1] if self.steps else None
        if not isinstance(row, _Row):
            row = _Row(self.native)
            self.steps.append(row)
        for call in calls:
            row.calls.append(call)
            for structure in (call, *getattr(call, "parts", ())):
                row.patches += [(structure, *patch) for patch in self._patches(structure)]
        return made

    def _patches(self, structure: ctypes.Structure) -> Iterator[tuple[str, int, int]]:
        """Fields that point into what is in a slot: its number, and how far behind the start."""
        starts = sorted(self.homes)
        for name, kind in (each[:2] for each in structure._fields_):
            address = getattr(structure, name) if kind is ctypes.c_void_p else None
            at = bisect_right(starts, address) - 1 if address else -1
            if address is None or at < 0:
                continue
            slot = self.homes[starts[at]]
            if address < starts[at] + self.values[slot].untyped_storage().nbytes():
                yield name, slot, address - starts[at]

    def _slot(self, value: object) -> _Slot:
        if isinstance(value, Tensor):  # of several, each is told apart when it is taken
            self.homes.setdefault(value.untyped_storage().data_ptr(), len(self.values))
        self.values.append(value)
        return _Slot(len(self.values) - 1)

    def _starts(self, value: Any) -> Iterator[int]:
        """Blocks of the arena that it lies in."""
        found = (each.untyped_storage().data_ptr() for each in _tensors(value))
        return (start for start in found if start in self.users)

    def _replay(self, result: Any) -> _Replay:
        needed = set(_slots(result))
        for step in reversed(self.steps):
            step.dead = sorted(set(step.reads()) - needed)
            needed.update(step.dead)
        return _Replay(self.steps, len(self.values), result, (self.arena, self.constants), self.arena.size)


class Replays:
    """The replays of a graph, by how its inputs are laid out: recorded when a layout comes for the second time.

    A call gives the bits of the graph. While one thread replays a layout, others run the graph. A copy starts empty.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph
        self._known: OrderedDict[object, _Replay | None] = OrderedDict()  # None: not to be recorded
        self._seen: object = None
        self._lock = Lock()

    def __call__(
        self, run: Callable[[], Any], state: object, reads: Sequence[object], constants: Sequence[Tensor]
    ) -> Any:
        """The graph's result, by `run` if not by a replay; `state` is what else must be the same for that."""
        key, native = (state, _layout(reads)), library()
        with self._lock:
            known, found = key in self._known, self._known.get(key)
            seen, self._seen = self._seen == key, key
            if known:
                self._known.move_to_end(key)
        if found is not None and found.lock.acquire(blocking=False):
            try:
                return found(reads)
            except FailedError:
                return run()  # and be told why
            finally:
                found.lock.release()
        if known or not seen or native is None:
            return run()
        try:
            replay, result = _Recorder(native, reads, constants).record(self._graph)
        except UnlikeError:
            self._keep(key, None)
            return run()
        self._keep(key, replay if replay.size <= LIMIT else None)
        return result

    def _keep(self, key: object, replay: _Replay | None) -> None:
        with self._lock:
            self._known[key] = replay
            while len(self._known) > _MOST or sum(each.size for each in self._known.values() if each) > LIMIT:
                self._known.popitem(last=False)

    def __len__(self) -> int:
        return sum(each is not None for each in self._known.values())

    def __reduce__(self) -> tuple[type[Replays], tuple[fx.Graph]]:
        return Replays, (self._graph,)


def _layout(reads: Sequence[object]) -> tuple[object, ...]:
    """All that shapes what a graph does with its inputs but their numbers; also which of them share memory."""
    first: dict[int, int] = {}
    return tuple(
        (each.dtype, each.shape, each.stride(), each.storage_offset(),
         first.setdefault(each.untyped_storage().data_ptr(), number))
        if isinstance(each, Tensor) else each
        for number, each in enumerate(reads)
    )  # fmt: skip


def _dying(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Behind which node nobody reads these any more."""
    order = {node: number for number, node in enumerate(graph.nodes)}
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in order:
        found.setdefault(max(node.users, key=order.__getitem__, default=node), []).append(node)
    return found


def _is_operator(target: object) -> bool:
    return isinstance(target, torch._ops.OpOverload)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (tuple, list)) and not isinstance(value, _Slot):
        for each in value:
            yield from _leaves(each)
    elif isinstance(value, dict):
        yield from _leaves(list(value.values()))
    else:
        yield value


def _tensors(value: Any) -> Iterator[Tensor]:
    return (each for each in _leaves(value) if isinstance(each, Tensor))


def _slots(value: Any) -> Iterator[int]:
    return (each.number for each in _leaves(value) if isinstance(each, _Slot))


def _filled(value: Any, values: Sequence[Any]) -> Any:
    """With what is in the slots."""
    if isinstance(value, _Slot):
        return values[value.number]
    if isinstance(value, (tuple, list)):
        return type(value)(_filled(each, values) for each in value)
    return {name: _filled(each, values) for name, each in value.items()} if isinstance(value, dict) else value


def _given(result: Any, values: Sequence[Any]) -> Any:
    """A result for the caller: nothing that the next call will write into."""
    if isinstance(result, Tensor):
        return result.clone()
    if isinstance(result, (tuple, list)) and not isinstance(result, _Slot):
        return type(result)(_given(each, values) for each in result)
    return _filled(result, values)
