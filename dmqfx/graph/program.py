"""The Program: an fx graph, what is known about it, and what was done to it. Persistent: a pass works on a fork."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Literal, TypeAlias

import networkx as nx
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from dmqfx.graph import ops
from dmqfx.graph.address import Address, Site
from dmqfx.graph.facts import Fact
from dmqfx.graph.journal import PassRecord
from dmqfx.graph.table import Table

Dim: TypeAlias = int | str
Outputs: TypeAlias = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Input:
    """One tensor input of a program; `name` is its placeholder.

    Shapes: dims of ints and names: "B" batch, "H", "W" (also "H/4" = ceil(H / 4), "H*8"), "T" context length.
    """

    name: str
    dims: tuple[Dim, ...]
    kind: Literal["normal", "timestep", "label", "size", "residual"] = "normal"
    dtype: torch.dtype = torch.float32
    high: int = 0

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Concrete sizes, e.g. of {"B": 2, "H": 64, "W": 64, "T": 77}."""
        return tuple(_size(dim, sizes) for dim in self.dims)

    @property
    def optional(self) -> bool:
        """Whether a call may leave it out: a missing residual is a zero that broadcasts."""
        return self.kind == "residual"


@dataclass(frozen=True)
class InputSpec:
    """What a program takes and returns, and the example sizes its shapes are shown at.

    Units: height and width must be multiples of `multiple_of` (1: any size).
    """

    root: str
    inputs: tuple[Input, ...]
    sizes: Mapping[str, int]
    multiple_of: int = 1
    outputs: tuple[str, ...] = ("sample",)

    def draw(
        self,
        generator: torch.Generator,
        *,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        **sizes: int,
    ) -> dict[str, Tensor]:
        """Random inputs of the given sizes (default: the example's): noise, distinct timesteps, legal labels."""
        wanted = {**self.sizes, **sizes}
        return {i.name: _draw(i, i.shape(wanted), generator, dtype).to(device) for i in self.inputs}


@dataclass(frozen=True, eq=False)
class Program:
    """A captured UNet: graph, table, facts, log, inputs.

    Never edited in place: `fork` gives a new graph over the same weight tensors, and only the Rewriter edits forks.
    """

    gm: fx.GraphModule
    inputs: InputSpec
    table: Table = field(default_factory=Table)
    facts: frozenset[Fact] = frozenset()
    log: tuple[PassRecord, ...] = ()

    def __call__(self, **inputs: Tensor) -> Outputs:
        """Run the graph as it stands on inputs named as in `inputs`; one tensor out, or a tuple of them."""
        result: Outputs = self.gm(**inputs)
        return result

    @property
    def graph(self) -> fx.Graph:
        """The fx graph. Read it; edit it only through a Rewriter."""
        return self.gm.graph

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype of the first placeholder."""
        return next(n.meta["val"].dtype for n in self.graph.nodes if n.op == "placeholder")

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next((t.device for t in self.weights().values()), torch.device("cpu"))

    @cached_property
    def _nodes(self) -> dict[Address, fx.Node]:
        return {node.meta["address"]: node for node in self.graph.nodes if "address" in node.meta}

    def calls(self, *names: str) -> Iterator[fx.Node]:
        """Operations in execution order, all of them or those of the named operators."""
        return (n for n in self._nodes.values() if not names or ops.is_call(n, *names))

    def node(self, at: Address | str) -> fx.Node:
        """The operation at an address.

        Raises: KeyError if there is none.
        """
        return self._nodes[Address.parse(at) if isinstance(at, str) else at]

    def __contains__(self, at: Address) -> bool:
        return at in self._nodes

    def source(self, site: Site) -> fx.Node:
        """The node whose value arrives at a site.

        Raises: KeyError if there is no such operation or the argument is not a tensor.
        """
        return ops.tensor(self.node(site.at), site.arg)

    def constant_at(self, site: Site) -> Tensor:
        """The constant that arrives at a site.

        Raises: KeyError if there is no such operation; TypeError if the value depends on an input.
        """
        return constant_of(self.source(site), lambda target: constant(self.gm, target))

    def weights(self) -> dict[str, Tensor]:
        """Every tensor constant by its name."""
        targets = dict.fromkeys(str(n.target) for n in self.graph.nodes if n.op == "get_attr")
        return {target: constant(self.gm, target) for target in targets}

    def fork(self) -> Program:
        """The same program with a graph of its own, over the SAME weight tensors."""
        return replace(self, gm=clone(self.gm))

    def with_table(self, table: Table) -> Program:
        """This program with another table."""
        return replace(self, table=table)

    def astype(self, dtype: torch.dtype) -> Program:
        """A twin that computes in another floating dtype: NEW tensors, no weight of this program is touched.

        Constants that name this program's dtype (casts inside the graph) follow.
        """
        gm = clone(self.gm, {name: _cast(value, dtype) for name, value in self.weights().items()})
        for node in gm.graph.nodes:
            swap = (
                dict.fromkeys((torch.float32, torch.float64, self.dtype), dtype)
                if node.op == "call_function"
                else {}
            )
            node.args = fx.node.map_aggregate(
                node.args, lambda a, swap=swap: swap.get(a, a) if _dtype(a) else a
            )
            node.kwargs = fx.node.map_aggregate(
                node.kwargs, lambda a, swap=swap: swap.get(a, a) if _dtype(a) else a
            )
        gm.recompile()
        inputs = replace(
            self.inputs,
            inputs=tuple(
                replace(i, dtype=dtype) if i.dtype.is_floating_point else i for i in self.inputs.inputs
            ),
        )
        propagate(gm, inputs)
        table = Table().put_all({})
        for site, entry in self.table:
            table = table.put(site, _cast_entry(entry, dtype))  # type: ignore[arg-type]  # entries are dataclasses
        return replace(self, gm=gm, inputs=inputs, table=table)

    def digraph(self) -> nx.DiGraph[str]:
        """A read-only networkx view, keyed by address; inputs and weights by name, and "output" at the end.

        Node attributes: op, node. Edge attribute: arg (the schema name, the first if a value is read twice).
        """
        graph: nx.DiGraph[str] = nx.DiGraph()
        for node in self.graph.nodes:
            graph.add_node(label(node), op=ops.name(node) or node.op, node=node)
            named = ops.args(node) if node.op == "call_function" else dict(enumerate(node.args))
            for arg, value in reversed(list(named.items())):
                fx.node.map_arg(
                    value, lambda read, arg=arg, to=node: graph.add_edge(label(read), label(to), arg=str(arg))
                )
        return nx.freeze(graph)


def label(node: fx.Node) -> str:
    """What a node is called wherever people read: its address, a weight's or an input's name, "output"."""
    if "address" in node.meta:
        return str(node.meta["address"])
    return str(node.target)


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
    if not isinstance(node, fx.Node) or node.op not in ("get_attr", "call_function"):
        return False
    return node.op == "get_attr" or (bool(node.all_input_nodes) and all(map(is_fixed, node.all_input_nodes)))


def constant_of(node: fx.Node, read: Callable[[str], Tensor]) -> Tensor:
    """The tensor of a fixed node; `read` gives weights by name.

    Raises: TypeError if the value depends on an input.
    """
    if node.op == "get_attr":
        return read(str(node.target))
    if not is_fixed(node) or not callable(node.target):
        raise TypeError(f"{label(node)} is computed from the inputs, it is no constant")
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: constant_of(n, read))
    with torch.no_grad():
        value = node.target(*args, **kwargs)
    if not isinstance(value, Tensor):
        raise TypeError(f"{label(node)} is a {type(value).__name__}, not a tensor")
    return value


def build(
    graph: fx.Graph, constants: Mapping[str, Tensor], modules: Mapping[str, nn.Module] | None = None
) -> fx.GraphModule:
    """A GraphModule over these tensors (as frozen parameters or buffers, shared, never copied)."""
    root: dict[str, object] = {name: _leaf(tensor) for name, tensor in constants.items()}
    gm = fx.GraphModule({**root, **(modules or {})}, graph, "Program")
    gm.eval()
    return gm


def copy_graph(source: fx.Graph) -> fx.Graph:
    """A graph of its own with the same nodes and meta, owned by no module."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(source, {}))
    graph.output_node().meta = dict(source.output_node().meta)
    return graph


def clone(gm: fx.GraphModule, constants: Mapping[str, Tensor] | None = None) -> fx.GraphModule:
    """A copy of the graph over the same tensors (or over those given), with observers copied."""
    graph = copy_graph(gm.graph)
    targets = [str(n.target) for n in graph.nodes if n.op == "get_attr"]
    return build(graph, constants or {t: constant(gm, t) for t in targets}, copy_modules(gm))


def copy_modules(gm: fx.GraphModule) -> dict[str, nn.Module]:
    """Copies of the modules that the graph calls (observers: the only state that changes)."""
    called = [str(n.target) for n in gm.graph.nodes if n.op == "call_module"]
    return {target: copy.deepcopy(gm.get_submodule(target)) for target in called}


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
        self.mode = mode

    def run_node(self, n: fx.Node) -> object:
        with self.mode:
            value = super().run_node(n)
        n.meta["val"] = value
        return value

    def get_attr(self, target: fx.node.Target, args: object, kwargs: object) -> FakeTensor:
        return self.mode.from_tensor(constant(self.module, str(target)).detach())  # type: ignore[arg-type]  # a GraphModule

    def call_module(self, target: fx.node.Target, args: tuple[object, ...], kwargs: object) -> object:
        return args[0]  # observers are identities


def _leaf(tensor: Tensor) -> Tensor:
    if isinstance(tensor, nn.Parameter) or not tensor.is_floating_point():
        return tensor
    return tensor.detach()


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to(dtype, copy=True) if tensor.is_floating_point() else tensor.detach().clone()


def _dtype(value: object) -> bool:
    return isinstance(value, torch.dtype)


def _cast_entry(entry: object, dtype: torch.dtype) -> object:
    changed: dict[str, object] = {}
    for f in fields(entry):  # type: ignore[arg-type]  # every entry is a dataclass
        value = getattr(entry, f.name)
        if isinstance(value, Tensor):
            changed[f.name] = _cast(value, dtype)
        elif hasattr(value, "__dataclass_fields__") and any(
            isinstance(v, Tensor) for v in vars(value).values()
        ):
            changed[f.name] = _cast_entry(value, dtype)
    return replace(entry, **changed)  # type: ignore[type-var]  # every entry is a dataclass


def _size(dim: Dim, sizes: Mapping[str, int]) -> int:
    if isinstance(dim, int):
        return dim
    if "*" in dim:
        name, _, factor = dim.partition("*")
        return sizes[name] * int(factor)
    name, _, divisor = dim.partition("/")
    return -(-sizes[name] // int(divisor or 1))


def _draw(i: Input, shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    if i.kind == "timestep":
        return (torch.rand(shape, generator=generator, dtype=torch.float64) * 999).to(dtype)
    if i.kind == "label":
        return torch.randint(0, max(i.high, 1), shape, generator=generator)
    if i.kind == "size":
        return torch.randint(0, 1024, shape, generator=generator).to(dtype)
    scale = 0.1 if i.kind == "residual" else 1.0
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)
