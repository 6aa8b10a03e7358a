"""Recording what a call of a graph does, and doing it again where inputs are laid out as before."""

from __future__ import annotations

import ctypes
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from threading import Lock
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode

from dmqfx.runtime.kernels.attend import attend
from dmqfx.runtime.kernels.codes import quantize
from dmqfx.runtime.kernels.native import Library, library, taped
from dmqfx.runtime.operators import OPS, kernel_conv2d, kernel_linear
from dmqfx.runtime.replay import Call, FailedError, Replay, Row, Slot, filled, given, slots, tensors

__all__ = ["LIMIT", "Replays", "is_native"]

LIMIT = 128 * 2**20
"""Bytes of results between kernels that the replays of one module may keep."""
_MOST, _SEEN = 8, 32  # layouts that are replayed, and remembered
_NATIVE: Mapping[object, Callable[..., Tensor]] = {
    OPS.kernel_conv2d.default: kernel_conv2d,
    OPS.kernel_linear.default: kernel_linear,
    OPS.kernel_quantize.default: quantize,
    OPS.kernel_attention.default: attend,
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


class Arena:
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
        sizes = [
            (block.nbytes(), -n) for n, block in enumerate(self._free) if need <= block.nbytes() <= 2 * need
        ]
        # of free blocks the smallest, of equal ones that which was used last; the tensor's own memory nobody else has
        block = self._free.pop(-min(sizes)[1]) if sizes else like.untyped_storage()
        self.blocks[block.data_ptr()] = block
        return torch.empty(0, dtype=like.dtype).set_(block, 0, like.shape, like.stride())

    def give(self, start: int) -> None:
        """Take back the block that starts there."""
        self._free.append(self.blocks[start])


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]  # what torch does with subclasses
    """Has what a native operator makes room for in the arena, and sees whether it does more than that."""

    def __init__(self, arena: Arena) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.arena, self.taken, self.computes = arena, list[Tensor](), False

    def __torch_dispatch__(
        self,
        func: Any,
        types: object,
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        made = func(*args, **(kwargs or {}))
        if func in _EMPTY:
            self.taken.append(self.arena.take(made))
            return self.taken[-1]
        aliases = [each.alias_info for each in func._schema.returns]
        self.computes |= any(alias is None or alias.is_write for alias in aliases)
        return made


class Recorder:
    """One call of a graph, and what it does."""

    def __init__(self, native: Library, reads: Sequence[object], constants: Sequence[Tensor]) -> None:
        self.native, self.constants, self.arena = native, constants, Arena()
        self.steps: list[Row | Call] = []
        self.values: list[
            Any
        ] = []  # of slots; all live until the end, since pointers are told by where they point to
        self.homes: dict[int, int] = {}  # where a storage of theirs starts, and the first slot there
        self.users: dict[int, int] = {}  # values that lie in a block of the arena
        self.own = {each.untyped_storage().data_ptr() for each in constants}
        for value in reads:
            self._slot(value)
        if self.own & self.homes.keys():
            raise UnlikeError("an input shares memory with a constant")

    def record(self, graph: fx.Graph) -> tuple[Replay, Any]:
        """Run the graph, whose placeholders are the reads, then the constants: what it did, and its result.

        Raises: UnlikeError for what cannot be done again.
        """
        reads = (Slot(k) if isinstance(each, Tensor) else each for k, each in enumerate(self.values))
        placed = iter([*reads, *self.constants])
        dying, known = _dying(graph), dict[fx.Node, Any]()
        for node in graph.nodes:
            if node.op == "output":
                result = fx.node.map_arg(node.args[0], known.__getitem__)
                break
            known[node] = next(placed) if node.op == "placeholder" else self._run(node, known)
            for start in self._starts(known[node]):
                self.users[start] += 1
            for dead in dying.get(node, ()):
                for start in self._starts(known.pop(dead)):
                    self.users[start] -= 1
                    if self.users[start] == 0:
                        self.arena.give(start)
        return self._replay(result), given(result, self.values)

    def _run(self, node: fx.Node, known: Mapping[fx.Node, Any]) -> Any:
        target: Any = node.target
        if node.op != "call_function" or (_is_operator(target) and target._schema.is_mutable):
            raise UnlikeError(f"{node.op} {target} may write into what it reads")
        args: Any = fx.node.map_arg(node.args, known.__getitem__)
        kwargs: Any = fx.node.map_arg(node.kwargs, known.__getitem__)
        now = filled(args, self.values), filled(kwargs, self.values)
        if is_native(node) and (coded := self._native(_NATIVE[target], *now)) is not None:
            return coded
        made = target(*now[0], **now[1])
        starts = [each.untyped_storage().data_ptr() for each in tensors(made)]
        moves = any(True for _ in slots((args, kwargs)))
        if not starts and moves and target is not torch.ops.aten.sym_size.int:
            raise UnlikeError(f"{target} makes numbers of what is in a tensor")
        if not starts or (not moves and all(start in self.users or start in self.own for start in starts)):
            return made  # a number that follows from the layout, or a view of what stays where it is
        if any(start in self.users for start in starts):
            raise UnlikeError(f"{target} gives both what stays where it is and what does not")
        slot = self._slot(made)
        self.steps.append(Call(target, args, kwargs, slot.number))
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
        if not isinstance(row, Row):
            row = Row(self.native)
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

    def _slot(self, value: object) -> Slot:
        if isinstance(value, Tensor):  # of several, each is told apart when it is taken
            self.homes.setdefault(value.untyped_storage().data_ptr(), len(self.values))
        self.values.append(value)
        return Slot(len(self.values) - 1)

    def _starts(self, value: Any) -> Iterator[int]:
        """Blocks of the arena that it lies in."""
        found = (each.untyped_storage().data_ptr() for each in tensors(value))
        return (start for start in found if start in self.users)

    def _replay(self, result: Any) -> Replay:
        needed = set(slots(result))
        for step in reversed(self.steps):
            step.dead = sorted(set(step.reads()) - needed)
            needed.update(step.dead)
        return Replay(self.steps, len(self.values), result, (self.arena, self.constants), self.arena.size)


class Replays:
    """The replays of a graph, by how its inputs are laid out: recorded when a layout comes for the second time.

    A call gives the bits of the graph. While one thread replays a layout, others run the graph. A copy starts empty.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph
        self._known: OrderedDict[object, Replay | None] = OrderedDict()  # None: cannot be recorded
        self._seen: OrderedDict[object, None] = OrderedDict()
        self._generation: object = None
        self._lock = Lock()

    def __call__(
        self,
        run: Callable[[], Any],
        generation: int,
        settings: object,
        reads: Sequence[object],
        constants: Sequence[Tensor],
    ) -> Any:
        """The graph's result, by `run` if not by a replay; `generation` is another one where constants are."""
        key, native = (settings, _layout(reads)), library()
        known, found, seen = self._at(key, generation)
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
            replay, result = Recorder(native, reads, constants).record(self._graph)
        except UnlikeError:
            self._keep(key, generation, None)
            return run()
        self._keep(key, generation, replay if replay.size <= LIMIT else None)
        return result

    def _at(self, key: object, generation: int) -> tuple[bool, Replay | None, bool]:
        """Whether a layout is known, with which replay, and whether it was seen before."""
        with self._lock:
            if generation != self._generation:  # what was recorded reads constants that are there no more
                self._known.clear()
                self._generation = generation
            known, seen = key in self._known, key in self._seen
            for table in (self._known, self._seen):
                if key in table:
                    table.move_to_end(key)
            self._seen[key] = None
            if len(self._seen) > _SEEN:
                self._seen.popitem(last=False)
            return known, self._known.get(key), seen

    def _keep(self, key: object, generation: int, replay: Replay | None) -> None:
        with self._lock:
            if generation != self._generation:
                return
            self._known[key] = replay
            while len(self._known) > _MOST or sum(each.size for each in self._known.values() if each) > LIMIT:
                self._known.popitem(last=False)

    def __len__(self) -> int:
        """Layouts that are replayed."""
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
