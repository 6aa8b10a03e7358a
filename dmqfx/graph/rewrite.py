"""The Rewriter: the only code that edits graphs. It names nodes, fakes their values, keeps the journal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode

from dmqfx.errors import RewriteError
from dmqfx.graph import ops
from dmqfx.graph.address import Address
from dmqfx.graph.journal import Journal
from dmqfx.graph.modules import Faking, build, call_with, constant_of, copy_graph, copy_modules, label
from dmqfx.graph.program import Program
from dmqfx.graph.table import Table

_MODULE = nn.Module()


@dataclass(frozen=True)
class Refuse:
    """A rule's answer when it matched but must not fire.

    Example:
        >>> Refuse("the scale is not per channel").reason
        'the scale is not per channel'
    """

    reason: str
    at: fx.Node | None = None


class Rewriter:
    """Edits a fork of a program on behalf of one pass; `finish` returns the new program.

    Example:
        >>> import torch
        >>> from diffusers import UNet2DModel
        >>> from dmqfx.frontend.capture import capture
        >>> levels = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
        >>> unet = UNet2DModel(block_out_channels=(8,), norm_num_groups=2, sample_size=8, **levels)
        >>> rw = Rewriter(capture(unet), "my-pass", Journal())
        >>> conv = rw.node(Address("conv_out", "conv2d"))
        >>> with rw.before(conv):
        ...     half = rw.call(torch.ops.aten.mul.Tensor, near=conv, self=ops.tensor(conv, "input"), other=0.5)
        >>> print(half.meta["address"])
        conv_out/mul~my-pass.1
    """

    def __init__(self, program: Program, step: str, journal: Journal) -> None:
        self.step, self.journal, self._source = step, journal, program
        self.graph = copy_graph(program.graph)
        self._constants = program.weights()
        self._modules = copy_modules(program.gm)
        self._fakes = Faking(_fake_mode(self.graph))
        self._made: Counter[tuple[str, str]] = Counter()
        self._nodes: dict[Address, fx.Node] = {
            node.meta["address"]: node for node in self.graph.nodes if "address" in node.meta
        }

    @property
    def table(self) -> Table:
        """The table of the program that is rewritten."""
        return self._source.table

    def node(self, at: Address) -> fx.Node:
        """The operation at an address in the fork."""
        return self._nodes[at]

    def value(self, node: fx.Node) -> Tensor:
        """The constant that a node is: a weight, or computed from weights alone.

        Raises: RewriteError if the value depends on an input.
        """
        try:
            return constant_of(node, self._constants.__getitem__)
        except TypeError as error:
            raise RewriteError(f"{self.step}: {error}") from error

    def module(self, node: fx.Node) -> nn.Module:
        """The module that a call_module node calls."""
        return self._modules[str(node.target)]

    @contextmanager
    def before(self, node: fx.Node) -> Iterator[None]:
        """New nodes are inserted before this one."""
        with self.graph.inserting_before(node):
            yield

    def constant(self, name: str, value: Tensor) -> fx.Node:
        """A new constant on the program's device; a taken `name` (by a constant, by a method of modules) gets a suffix."""
        value = value.detach().to(self._source.device)
        unique, k = name, 1
        while unique in self._constants or hasattr(_MODULE, unique.rpartition(".")[2]):
            k += 1
            unique = f"{name}_{k}"
        self._constants[unique] = value
        node = self.graph.get_attr(unique)
        node.meta["val"] = self._fakes.constant(value)
        return node

    def call(self, target: OpOverload, /, near: fx.Node, **named: fx.node.Argument | Tensor) -> fx.Node:
        """A new operation, made on behalf of `near` (which gives the path of its address); arguments by schema name.

        Tensors among the arguments become constants.
        """
        path = near.meta["address"].path
        op = target._schema.name.partition("::")[2]
        return self._create(target, named, self._made_here(path, op), f"{path}.{op}_".lstrip("."))

    def call_at(self, target: OpOverload, at: Address, /, **named: fx.node.Argument | Tensor) -> fx.Node:
        """Another operator at the same address; `replace` the old operation by it."""
        return self._create(target, named, at, f"{at.path}.{at.op}_".lstrip("."))

    def like(self, node: fx.Node, **changed: fx.node.Argument | Tensor) -> fx.Node:
        """The same operation with some arguments changed; it takes over the address, so `replace` the old one by it."""
        if not isinstance(node.target, OpOverload):
            raise RewriteError(f"{self.step}: {label(node)} is not an operator call")
        address: Address = node.meta["address"]
        prefix = f"{address.path}.".lstrip(".")
        return self._create(node.target, {**ops.args(node), **changed}, address, prefix, old=node)

    def observer(self, x: fx.Node, module: nn.Module, name: str, at: Address, *more: fx.Node) -> fx.Node:
        """An identity module call behind `x`, inserted at the current point; `name` gets a suffix where it is taken."""
        unique, k = name, 1
        while unique in self._modules:
            k += 1
            unique = f"{name}_{k}"
        self._modules[unique] = module
        node = self.graph.call_module(unique, (x, *more))
        node.meta = {"address": self._made_here(at.path, "observe"), "val": x.meta["val"]}
        self._nodes[node.meta["address"]] = node
        return node

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Every reader of `old` reads `new` instead, except `new` itself."""
        old.replace_all_uses_with(new, delete_user_cb=lambda reader: reader is not new)
        if new.meta.get("address") == old.meta.get("address"):
            self._nodes[new.meta["address"]] = new
        if not old.users:
            self.graph.erase_node(old)

    def redirect(self, reader: fx.Node, old: fx.Node, new: fx.Node) -> None:
        """Only `reader` reads `new` instead of `old`."""
        reader.replace_input_with(old, new)

    def respell(self, node: fx.Node) -> bool:
        """Put a call's arguments into canonical spelling; whether anything changed."""
        if not isinstance(node.target, OpOverload):
            return False
        args, kwargs = ops.call_spelling(node.target, ops.args(node))
        if repr((args, kwargs)) == repr((node.args, node.kwargs)):
            return False
        node.args, node.kwargs = args, kwargs
        return True

    def finish(self) -> Program:
        """The program with the edited graph: dead code removed, unused constants dropped, linted and recompiled.

        Raises: RewriteError if the graph is broken or two operations share an address.
        """
        try:
            self.graph.eliminate_dead_code(is_impure_node=_is_needed)
            self._restore_names()
            used = {str(n.target) for n in self.graph.nodes if n.op == "get_attr"}
            called = {str(n.target) for n in self.graph.nodes if n.op == "call_module"}
            gm = build(
                self.graph,
                {name: value for name, value in self._constants.items() if name in used},
                {name: module for name, module in self._modules.items() if name in called},
            )
            gm.graph.lint()
        except RuntimeError as error:
            raise RewriteError(f"{self.step} left a broken graph: {str(error).splitlines()[0]}") from error
        return replace(self._source, gm=gm)

    def _made_here(self, path: str, op: str) -> Address:
        """The next free address of an operation that this step makes."""
        while True:
            self._made[path, op] += 1
            address = Address(path, op, 0, f"{self.step}.{self._made[path, op]}")
            if address not in self._nodes:
                return address

    def _create(
        self,
        target: OpOverload,
        named: dict[str, fx.node.Argument | Tensor],
        address: Address,
        prefix: str,
        old: fx.Node | None = None,
    ) -> fx.Node:
        before = ops.args(old) if old is not None else {}
        nodes: dict[str, fx.node.Argument] = {}
        for key, value in named.items():
            if isinstance(value, Tensor):
                read = before.get(key)
                name = (
                    str(read.target)
                    if isinstance(read, fx.Node) and read.op == "get_attr"
                    else f"{prefix}{key}"
                )
                nodes[key] = self.constant(name, value)
            else:
                nodes[key] = value
        args, kwargs = ops.call_spelling(target, nodes)
        node = self.graph.call_function(target, args, kwargs)
        node.meta = {"address": address, "val": self._fake(target, args, kwargs)}
        self._nodes[address] = node
        return node

    def _fake(self, target: OpOverload, args: fx.node.Argument, kwargs: fx.node.Argument) -> object:
        def call(*positional: object, **keywords: object) -> object:
            return self._fakes.call(target, positional, keywords)

        return call_with(call, args, kwargs, lambda n: n.meta["val"])

    def _restore_names(self) -> None:
        """Give `name_2` its plain name back when the constant that had it is gone."""
        nodes = [n for n in self.graph.nodes if n.op == "get_attr"]
        readers, plain = Counter(str(n.target) for n in nodes), self._source.weights()
        for node in nodes:
            name = str(node.target)
            stem, _, number = name.rpartition("_")
            if number.isdigit() and stem in plain and not readers[stem] and readers[name] == 1:
                self._constants[stem] = self._constants[name]
                readers[stem], readers[name] = 1, 0
                node.target = stem


def _is_needed(node: fx.Node) -> bool:
    """Whether an operation stays though nothing reads it; an observer that nothing reads sees nothing of use."""
    return node.op in ("placeholder", "output") or (node.op == "call_function" and node.is_impure())


def _fake_mode(graph: fx.Graph) -> FakeTensorMode:
    for node in graph.nodes:
        mode = getattr(node.meta.get("val"), "fake_mode", None)
        if isinstance(mode, FakeTensorMode):
            return mode
    raise RewriteError("the graph has no fake values; run dmqfx.graph.modules.propagate first")
