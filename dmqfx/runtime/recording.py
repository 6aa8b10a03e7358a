"""Recording what a call of a graph does, and doing it again where inputs are laid out as before."""

from __future__ import annotations

import ctypes
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from threading import Lock
from typing import Any

import torch
from torch import Tensor, fx

from dmqfx.runtime import arena
from dmqfx.runtime.arena import Arena, UnlikeError, Watch
from dmqfx.runtime.kernels.attend import attend, average
from dmqfx.runtime.kernels.codes import quantize
from dmqfx.runtime.kernels.native import Library, library, taped
from dmqfx.runtime.kernels.norms import group_norm_silu
from dmqfx.runtime.operators import OPS, kernel_conv2d, kernel_linear
from dmqfx.runtime.replay import Call, FailedError, Replay, Row, Slot, filled, given, layout, slots, tensors

__all__ = ["Replays", "is_native"]

_MOST, _SEEN = 8, 32  # layouts that are replayed, and remembered
_AGAIN = 16  # calls of a layout until it is recorded anew, once others took its place
_OPERANDS = {"x", "beside", "x_codes", "added", "group", "query", "key", "value", "norm_scale", "norm_shift"}
"""Of native operators, what a kernel reads where it lies; of all others it reads tables that are made once."""
_NATIVE: Mapping[object, Callable[..., Tensor]] = {
    OPS.kernel_conv2d.default: kernel_conv2d,
    OPS.kernel_linear.default: kernel_linear,
    OPS.kernel_quantize.default: quantize,
    OPS.kernel_attention.default: attend,
    OPS.kernel_sdpa.default: average,
    OPS.kernel_group_norm_silu.default: group_norm_silu,
}


def is_native(node: fx.Node) -> bool:
    """Whether a node calls a kernel that a replay can call."""
    return node.op == "call_function" and node.target in _NATIVE


class Recorder:
    """One call of a graph, and what it does."""

    def __init__(self, native: Library, reads: Sequence[object], constants: Sequence[Tensor]) -> None:
        self.native, self.constants, self.arena = native, constants, Arena()
        self.steps: list[Row | Call] = []
        self.values: list[Any] = []  # of slots
        self.users: dict[int, int] = {}  # values that lie in a block of the arena
        self.unlike = False  # whether something cannot be done again
        self.own = {each.untyped_storage().data_ptr() for each in constants}
        for value in reads:
            self._slot(value)
        if any(_overlap(a, b) for a in tensors(reads) for b in constants):
            raise UnlikeError("an input shares memory with a constant")

    def record(self, graph: fx.Graph) -> tuple[Replay | None, Any]:
        """Run the graph, whose placeholders are the reads, then the constants: what it did, and its result.

        Where something cannot be done again, the rest is run and no more: no replay, but the result.
        Raises: UnlikeError, before anything is run, for a graph that may write into what it reads.
        """
        for node in graph.nodes:
            plain = node.op in ("placeholder", "call_function", "output")
            if not plain or (_is_operator(node.target) and node.target._schema.is_mutable):
                raise UnlikeError(f"{node.op} {node.target} may write into what it reads")
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
                self._forget(known.pop(dead))
        if self.unlike:
            return None, filled(result, self.values)
        return self._replay(result), given(result, self.values)

    def _forget(self, value: Any) -> None:
        """A value that nobody reads any more."""
        for start in self._starts(value):
            self.users[start] -= 1
            if self.users[start] == 0:
                self.arena.give(start)
        for number in slots(value):
            self.values[number] = None

    def _run(self, node: fx.Node, known: Mapping[fx.Node, Any]) -> Any:
        target: Any = node.target
        args: Any = fx.node.map_arg(node.args, known.__getitem__)
        kwargs: Any = fx.node.map_arg(node.kwargs, known.__getitem__)
        if not self.unlike:
            try:
                return self._noted(node, args, kwargs)
            except UnlikeError:
                self.unlike, self.arena = True, Arena()  # what is read still keeps its own memory
                self.users.clear()
                self.steps.clear()
        return target(*filled(args, self.values), **filled(kwargs, self.values))

    def _noted(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """What an operation makes, noted as a step.

        Raises: UnlikeError for what cannot be done again.
        """
        target: Any = node.target
        if is_native(node) and (coded := self._native(node, args, kwargs)) is not None:
            return coded
        made = target(*filled(args, self.values), **filled(kwargs, self.values))
        starts = [each.untyped_storage().data_ptr() for each in tensors(made)]
        moves = any(True for _ in slots((args, kwargs)))
        if not starts and moves and target is not torch.ops.aten.sym_size.int:
            raise UnlikeError(f"{target} makes numbers of what is in a tensor")
        if not starts or (not moves and all(start in self.users or start in self.own for start in starts)):
            return made  # a number that follows from the layout, or a view of what stays where it is
        if any(start in self.users for start in starts):
            raise UnlikeError(f"{target} gives both what stays where it is and what does not")
        slot = self._slot(made)
        self.steps.append(Call(target, args, kwargs, slot.number, list(map(layout, tensors(made)))))
        return slot

    def _native(self, node: fx.Node, args: Any, kwargs: Any) -> Tensor | None:
        """What a native operator makes, or None if it does more than call the kernels."""
        target: Any = node.target
        named = dict(zip((each.name for each in target._schema.arguments), args, strict=False)) | kwargs
        if any(name not in _OPERANDS for name, value in named.items() for _ in slots(value)):
            return None
        with taped() as calls, Watch(self.arena) as watch:
            made = _NATIVE[target](*filled(args, self.values), **filled(kwargs, self.values))
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
                row.patches += [(structure, *patch) for patch in self._patches(structure, set(slots(named)))]
        return made

    def _patches(self, structure: ctypes.Structure, among: set[int]) -> Iterator[tuple[str, int, int]]:
        """Fields that point into what is in one of these slots: its number, and how far behind the start of its memory."""
        for name, kind in (each[:2] for each in structure._fields_):
            address = getattr(structure, name) if kind is ctypes.c_void_p else None
            for slot in among if address else ():
                memory = self.values[slot].untyped_storage()
                if memory.data_ptr() <= address < memory.data_ptr() + memory.nbytes():
                    yield name, slot, address - memory.data_ptr()
                    break

    def _slot(self, value: object) -> Slot:
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
        self._known: OrderedDict[object, Replay] = OrderedDict()
        self._waits: OrderedDict[object, float] = OrderedDict()  # calls until a layout is recorded
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
        found, waits = self._at(key, generation)
        if found is not None and found.lock.acquire(blocking=False):
            try:
                return found(reads)
            except FailedError:
                self._drop(key)
            finally:
                found.lock.release()
        if found is not None or waits > 0 or native is None:
            return run()
        try:
            replay, result = Recorder(native, reads, constants).record(self._graph)
        except UnlikeError:
            self._drop(key)
            return run()
        if replay is None:
            self._drop(key)
        else:
            self._keep(key, generation, replay)
        return result

    def _at(self, key: object, generation: int) -> tuple[Replay | None, float]:
        """The replay of a layout, if there is one; how many more calls it waits for one."""
        with self._lock:
            if generation != self._generation:  # what was recorded reads constants that are there no more
                self._known.clear()
                self._waits.clear()
                self._generation = generation
            if (found := self._known.get(key)) is not None:
                self._known.move_to_end(key)
                return found, 0
            waits = self._waits.pop(key, 1)
            self._waits[key] = max(0, waits - 1)
            while len(self._waits) > _SEEN:
                self._waits.popitem(last=False)
            return None, waits

    def _drop(self, key: object) -> None:
        """Never record this layout again."""
        with self._lock:
            self._known.pop(key, None)
            self._waits[key] = math.inf

    def _keep(self, key: object, generation: int, replay: Replay) -> None:
        with self._lock:
            if generation != self._generation:
                return
            self._known[key] = replay
            while len(self._known) > _MOST or sum(each.size for each in self._known.values()) > arena.LIMIT:
                oldest, _ = self._known.popitem(last=False)
                self._waits[oldest] = _AGAIN

    def __len__(self) -> int:
        """Layouts that are replayed."""
        return len(self._known)

    def __reduce__(self) -> tuple[type[Replays], tuple[fx.Graph]]:
        return Replays, (self._graph,)


def _layout(reads: Sequence[object]) -> tuple[object, ...]:
    """All that shapes what a graph does with its inputs but their numbers; also which of them share memory."""
    first: dict[int, int] = {}
    return tuple(
        (*layout(each), first.setdefault(each.untyped_storage().data_ptr(), number))
        if isinstance(each, Tensor)
        else each
        for number, each in enumerate(reads)
    )


def _dying(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Behind which node nobody reads these any more."""
    order = {node: number for number, node in enumerate(graph.nodes)}
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in order:
        found.setdefault(max(node.users, key=order.__getitem__, default=node), []).append(node)
    return found


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors share memory, as far as their storages do."""
    one, two = a.untyped_storage(), b.untyped_storage()
    return one.data_ptr() < two.data_ptr() + two.nbytes() and two.data_ptr() < one.data_ptr() + one.nbytes()


def _is_operator(target: object) -> bool:
    return isinstance(target, torch._ops.OpOverload)
