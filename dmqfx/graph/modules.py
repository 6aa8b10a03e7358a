"""GraphModules over shared tensors: building, copying, constants by name, fake values."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx._lazy_graph_module import _LazyGraphModule  # private, and in every torch since 2.3

from dmqfx.graph.inputs import InputSpec


def label(node: fx.Node) -> str:
    """What a node is called wherever people read: its address, a weight's or an input's name, "output"."""
    if "address" in node.meta:
        return str(node.meta["address"])
    return str(node.target)


def constants(gm: fx.GraphModule) -> dict[str, Tensor]:
    """Every tensor that the graph reads, by its get_attr target, in the graph's order."""
    held = dict(gm.named_buffers(remove_duplicate=False))
    held.update(gm.named_parameters(remove_duplicate=False))
    targets = dict.fromkeys(str(n.target) for n in gm.graph.nodes if n.op == "get_attr")
    return {target: held[target] if target in held else constant(gm, target) for target in targets}


def constant(gm: fx.GraphModule, target: str) -> Tensor:
    """The tensor behind a get_attr target."""
    value: object = gm
    for part in target.split("."):
        value = getattr(value, part)
    if not isinstance(value, Tensor):
        raise TypeError(f"{target} is a {type(value).__name__}, not a tensor")
    return value


def is_fixed(node: fx.node.Argument) -> bool:
    """Whether a value is a constant: a weight, or computed from weights alone (a scaled weight)."""
    if not isinstance(node, fx.Node):
        return False
    waiting, seen = [node], {node}  # no recursion: a UNet is deeper than Python's stack
    while waiting:
        each = waiting.pop()
        if each.op == "get_attr":
            continue
        if each.op != "call_function" or not each.all_input_nodes:
            return False
        waiting += [read for read in each.all_input_nodes if read not in seen]
        seen.update(each.all_input_nodes)
    return True


def fixed_nodes(graph: fx.Graph) -> frozenset[fx.Node]:
    """Every node of which `is_fixed` holds, by one look at each."""
    found = set[fx.Node]()
    for node in graph.nodes:
        reads = node.all_input_nodes
        if node.op == "get_attr" or (node.op == "call_function" and reads and found.issuperset(reads)):
            found.add(node)
    return frozenset(found)


def constant_of(node: fx.Node, read: Callable[[str], Tensor]) -> Tensor:
    """The tensor of a fixed node; `read` gives weights by name.

    Raises: TypeError if the value depends on an input.
    """
    if node.op == "get_attr":
        return read(str(node.target))
    if not is_fixed(node) or not callable(node.target):
        raise TypeError(f"{label(node)} is computed from the inputs, it is no constant")
    with torch.no_grad():
        value = call_with(node.target, node.args, node.kwargs, lambda n: constant_of(n, read))
    if not isinstance(value, Tensor):
        raise TypeError(f"{label(node)} is a {type(value).__name__}, not a tensor")
    return value


def call_with(
    target: Callable[..., object], args: object, kwargs: object, value_of: Callable[[fx.Node], object]
) -> object:
    """A call with each node among its arguments, at any depth, replaced by a value."""
    given: Any = (args, kwargs)  # fx's types know only what a graph may hold, and values may be anything
    read: Any = value_of
    positional, keywords = fx.node.map_arg(given, read)
    return target(*positional, **keywords)


def computed(node: fx.Node, value_of: Callable[[fx.Node], object]) -> object:
    """What an operation or the output makes of the values that it reads; an observer is the identity."""
    if node.op == "output":
        return call_with(lambda value: value, node.args, {}, value_of)
    if node.op == "call_module":
        return call_with(lambda x, *_: x, node.args, {}, value_of)
    assert callable(node.target)
    return call_with(node.target, node.args, node.kwargs, value_of)


def build(
    graph: fx.Graph, held: Mapping[str, Tensor], modules: Mapping[str, nn.Module] | None = None
) -> fx.GraphModule:
    """A GraphModule over these tensors (as frozen parameters or buffers, shared, never copied).

    Where values are hoisted, it keeps them between calls. Its code is made when it is first called: most of what
    passes build never is.
    """
    from dmqfx.graph.hoisting import hoisted_in
    from dmqfx.runtime.hoisted import HoistedModule

    root: dict[str, object] = {name: _leaf(tensor) for name, tensor in held.items()}
    kind = HoistedModule if hoisted_in(graph) else _LazyGraphModule
    gm = kind({**root, **(modules or {})}, graph, "Program")
    gm.eval()
    return gm


def copy_graph(source: fx.Graph) -> fx.Graph:
    """A graph of its own with the same nodes and meta, owned by no module."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(source, {}))
    graph.output_node().meta = dict(source.output_node().meta)
    return graph


def clone(gm: fx.GraphModule, held: Mapping[str, Tensor] | None = None) -> fx.GraphModule:
    """A copy of the graph over the same tensors (or over those given), with observers copied."""
    return build(copy_graph(gm.graph), held or constants(gm), copy_modules(gm))


def copy_modules(gm: fx.GraphModule) -> dict[str, nn.Module]:
    """Copies of the modules that the graph calls (observers: the only state that changes)."""
    called = [str(n.target) for n in gm.graph.nodes if n.op == "call_module"]
    return {target: copy.deepcopy(gm.get_submodule(target)) for target in called}


class Faking:
    """Fake values, without numbers: shapes, dtypes and layouts. What is of one form is found once, and is one tensor.

    Finding one takes torch up to milliseconds, which was most of the time that lowering a large model took, and most layers
    have a twin. Sizes are numbers.
    """

    def __init__(self, mode: FakeTensorMode) -> None:
        self.mode = mode
        self._known: dict[object, Tensor] = {}

    def constant(self, value: Tensor) -> Tensor:
        """Laid out like a constant; it does not know whose memory that is."""
        form = _form(value)
        if form not in self._known:
            with self.mode:
                self._known[form] = torch.empty_strided(
                    value.shape, value.stride(), dtype=value.dtype, device=value.device
                )
        return self._known[form]

    def call(self, target: fx.node.Target, args: Sequence[object], kwargs: Mapping[str, object]) -> object:
        """What an operation makes of fake values; its own tensor where it may be a view of one that it reads."""
        assert callable(target)
        form = (target, _form(args), _form(kwargs)) if _makes_one(target) else None
        if form in self._known:
            return self._known[form]
        with self.mode, torch.no_grad():
            made: object = target(*args, **kwargs)
        if form is not None and isinstance(made, Tensor):
            self._known[form] = made
        return made


def _form(value: object) -> object:
    """All of a call's argument that a fake value depends on."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, (tuple, list)):
        return tuple(map(_form, value))
    if isinstance(value, Mapping):
        return tuple((name, _form(each)) for name, each in value.items())
    return type(value), value


@cache
def _makes_one(target: object) -> bool:
    """Whether an operation gives one tensor and none that it says to be a view, and writes into none."""
    if not isinstance(target, OpOverload):
        return False
    makes, takes = target._schema.returns, target._schema.arguments
    shared = any(each.alias_info is not None for each in (*makes, *takes))
    return not shared and [str(each.type) for each in makes] == ["Tensor"]


def propagate(gm: fx.GraphModule, inputs: InputSpec) -> None:
    """Give every node its fake value (meta "val") at the example sizes."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    device = next((tensor.device for tensor in gm.state_dict().values()), None)
    with mode:
        examples = [torch.empty(i.shape(inputs.sizes), dtype=i.dtype, device=device) for i in inputs.inputs]
        _Shapes(gm, mode).run(*examples)


class _Shapes(fx.Interpreter):
    """Runs a graph on fake tensors and notes each value."""

    def __init__(self, gm: fx.GraphModule, mode: FakeTensorMode) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.fakes, self.held = Faking(mode), constants(gm)

    def run_node(self, n: fx.Node) -> object:
        value = n.meta["val"] = super().run_node(n)
        return value

    def get_attr(self, target: fx.node.Target, args: object, kwargs: object) -> Tensor:
        return self.fakes.constant(self.held[str(target)])

    def call_function(
        self, target: fx.node.Target, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> object:
        return self.fakes.call(target, args, kwargs)

    def call_module(self, target: fx.node.Target, args: tuple[object, ...], kwargs: object) -> object:
        return args[0]  # observers are identities


def _leaf(tensor: Tensor) -> Tensor:
    if isinstance(tensor, nn.Parameter) or not tensor.is_floating_point():
        return tensor
    return tensor.detach()
