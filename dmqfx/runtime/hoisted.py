"""A graph module that computes its hoisted values once for each content of what they depend on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from dmqfx.errors import RewriteError
from dmqfx.graph import ops
from dmqfx.graph.hoisting import between, hoisted_in, is_size, roots
from dmqfx.runtime.memory import Constants, Memory, Weights, content
from dmqfx.runtime.recording import Replays, is_native

__all__ = ["HoistedModule"]

Function = Callable[..., Any]  # what fx compiles: it takes and gives what a graph may hold


class HoistedModule(fx.GraphModule):
    """A graph in parts: one for each set of inputs that hoisted values depend on, and the rest, which reads those.

    The values of a part are kept in `memory` by the content of all that the part reads, and taken from there when
    that content comes again, in whatever tensors. Nothing is kept or taken while gradients are wanted, under autocast,
    on other devices than the CPU, and while somebody traces: then the graph runs as it stands.
    """

    memory: Memory

    def recompile(self) -> Any:
        """The code of the graph anew, and its parts; what was kept is forgotten."""
        code = super().recompile()
        cls: Any = type(self)
        self._flat, cls.forward = cls.forward, HoistedModule._remembering
        self._inputs = {str(n.target): n.name for n in self.graph.nodes if n.op == "placeholder"}
        self._sizes, self._parts, self._rest = _cut(self.graph)
        self._again = Replays(self._rest.graph) if any(map(is_native, self._rest.graph.nodes)) else None
        self._rest_weights = Weights(self, self._rest.weights)
        self._weights = Weights(self, tuple(dict.fromkeys(w for part in self._parts for w in part.weights)))
        self.memory, self._constants = Memory(), dict[int, Constants]()
        return code

    def _remembering(self, *args: object, **kwargs: object) -> object:
        """One call of the graph."""
        given = {**dict(zip(self._inputs, args, strict=False)), **kwargs}
        generation = self._weights.generation() if _is_plain(given.values()) else None
        if generation is None or given.keys() != self._inputs.keys():
            return self._flat(self, *args, **kwargs)
        known = {self._inputs[name]: value for name, value in given.items()}
        known.update(self._sizes.results(self, known))
        for number, part in enumerate(self._parts):
            read = [known[name] for name in part.reads]
            key = (number, generation, _settings(), self._key(read))
            values = self.memory.recall(key)
            if values is None:
                values = _apart(part.run(self, *read), read)
                self.memory.keep(key, values)
            known.update(zip(part.gives, values, strict=True))
        return self._ended([known[name] for name in self._rest.reads])

    def _ended(self, reads: Sequence[object]) -> object:
        """The rest of a call, which reads what is kept."""
        generation = self._rest_weights.generation() if self._again is not None else None
        if self._again is None or generation is None:
            return self._rest.run(self, *reads)
        constants = self.constants(self._rest.weights)
        return self._again(lambda: self._rest.run(self, *reads), generation, _settings(), reads, constants)

    def constants(self, names: tuple[str, ...]) -> list[Tensor]:
        """The constants of these names as they are now."""
        found = self._constants.get(id(names))
        if found is None:
            found = self._constants[id(names)] = Constants(self, names)
        return found()

    def _key(self, read: Sequence[object]) -> tuple[object, ...]:
        return tuple(map(content, read))

    def __reduce__(self) -> Any:
        """Pickled as the plain graph."""
        return fx.GraphModule(self, self.graph, "Program").__reduce__()


@dataclass(frozen=True, eq=False)
class _Part:
    """Some operations of a graph as a function of the module and of the values that they read, by name of node."""

    reads: tuple[str, ...]
    gives: tuple[str, ...]
    run: Function
    weights: tuple[str, ...]
    graph: fx.Graph  # its placeholders are what it reads, then the weights

    def results(self, module: nn.Module, known: Mapping[str, object]) -> dict[str, object]:
        """What it gives, by name."""
        values = self.run(module, *(known[name] for name in self.reads)) if self.gives else ()
        return dict(zip(self.gives, values, strict=True))


def _cut(graph: fx.Graph) -> tuple[_Part, list[_Part], _Part]:
    """The sizes of inputs that parts read, the parts in an order in which they can run, and the rest.

    Raises: RewriteError for hoisted values that wait for each other.
    """
    marks = hoisted_in(graph)
    sizes = [node for node in graph.nodes if is_size(node)]
    grouped: dict[frozenset[str], list[fx.Node]] = {}
    for mark in marks:
        grouped.setdefault(roots(mark), []).append(mark)
    waiting = [_part(group, [*marks, *sizes]) for group in grouped.values()]
    read = {name for part in waiting for name in part.reads}
    numbers = [node for node in sizes if node.name in read]
    parts, known = (
        list[_Part](),
        {n.name for n in graph.nodes if n.op == "placeholder"} | {n.name for n in numbers},
    )
    while waiting:
        ready = next((part for part in waiting if known.issuperset(part.reads)), None)
        if ready is None:
            raise RewriteError(f"hoisted values wait for each other: {', '.join(waiting[0].gives[:3])}")
        waiting.remove(ready)
        parts.append(ready)
        known.update(ready.gives)
    output = graph.output_node()
    inner, reads = between([output], marks)
    rest = _function(inner, reads, output.args[0])
    return _compiled(numbers, numbers, []), parts, rest


def _part(marks: Sequence[fx.Node], stops: Iterable[fx.Node]) -> _Part:
    """What computes these hoisted values."""
    return _compiled(marks, [ops.tensor(mark, "x") for mark in marks], stops)


def _compiled(gives: Sequence[fx.Node], ends: Sequence[fx.Node], stops: Iterable[fx.Node]) -> _Part:
    inner, reads = between(ends, stops)
    return replace(_function(inner, reads, tuple(ends)), gives=tuple(n.name for n in gives))


def _function(inner: Iterable[fx.Node], reads: Sequence[fx.Node], result: fx.node.Argument) -> _Part:
    """Nodes of a graph as a function of a module and of what they read; constants are looked up once for all calls."""
    part = fx.Graph()
    copies = {node: part.placeholder(node.name) for node in reads}
    held: dict[str, fx.Node] = {}
    rest = [node for node in inner if node.op != "output"]
    for node in rest:
        if node.op == "get_attr":
            if str(node.target) not in held:
                held[str(node.target)] = part.placeholder(node.name)
            copies[node] = held[str(node.target)]
    for node in rest:
        if node.op != "get_attr":
            copies[node] = part.node_copy(node, copies.__getitem__)
    part.output(fx.node.map_arg(result, copies.__getitem__))
    code = part.python_code("self")
    scope = dict(code.globals)
    exec(code.src, scope)  # as fx does with the whole graph
    made: Function = scope["forward"]
    names = tuple(held)

    def run(module: HoistedModule, *read: object) -> object:
        return made(module, *read, *module.constants(names))

    return _Part(tuple(n.name for n in reads), (), run, names, part)


def _is_plain(values: Iterable[object]) -> bool:
    """Whether a call is one of numbers alone: nobody traces it, follows it, or changes what operators do."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() or torch.is_autocast_enabled("cpu"):
        return False
    if torch._C._are_functorch_transforms_active() or _get_current_dispatch_mode() is not None:
        return False
    followed = torch.is_grad_enabled()
    return all(
        isinstance(each, Tensor)
        and type(each) in (Tensor, nn.Parameter)
        and each.device.type == "cpu"
        and not (followed and each.requires_grad)
        for each in values
    )


def _settings() -> tuple[object, ...]:
    """What may change the last bits of a result, or what may be done with it."""
    attention = (
        torch._C._get_flash_sdp_enabled(),
        torch._C._get_math_sdp_enabled(),
    )  # on the CPU too
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    return threads, precision, torch.is_inference_mode_enabled(), attention


def _apart(values: Sequence[Tensor], read: Iterable[object]) -> tuple[Tensor, ...]:
    """Values in memory that is not the caller's, who may write into it."""
    shared = {each.untyped_storage().data_ptr() for each in read if isinstance(each, Tensor)}
    return tuple(v.clone() if v.untyped_storage().data_ptr() in shared else v for v in values)
