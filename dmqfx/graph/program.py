"""The Program: an fx graph, what is known about it, what was done to it. Persistent: passes work on forks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeAlias

import networkx as nx
import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from dmqfx.graph import ops
from dmqfx.graph.address import Address, Site
from dmqfx.graph.facts import Fact
from dmqfx.graph.inputs import InputSpec
from dmqfx.graph.journal import PassRecord
from dmqfx.graph.modules import clone, constant, constant_of, constants, label
from dmqfx.graph.table import Table
from dmqfx.graph.twin import twin_module, twin_table

Outputs: TypeAlias = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Program:
    """A captured UNet: graph, table, facts, log, inputs.

    Never edited in place: `fork` gives a new graph over the same weight tensors, and only the Rewriter edits
    forks.

    Example:
        >>> from diffusers import UNet2DModel
        >>> from dmqfx.frontend.capture import capture
        >>> levels = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
        >>> unet = UNet2DModel(block_out_channels=(8,), norm_num_groups=2, sample_size=8, **levels)
        >>> program = capture(unet)
        >>> program.fork().weights()["conv_in.weight"].data_ptr() == unet.conv_in.weight.data_ptr()
        True
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
        found: torch.dtype = next(n.meta["val"].dtype for n in self.graph.nodes if n.op == "placeholder")
        return found

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        first = next((str(node.target) for node in self.graph.nodes if node.op == "get_attr"), None)
        return torch.device("cpu") if first is None else constant(self.gm, first).device

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
        return constants(self.gm)

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
        gm, inputs = twin_module(self.gm, self.inputs, dtype)
        return replace(self, gm=gm, inputs=inputs, table=twin_table(self.table, dtype))

    def digraph(self) -> nx.DiGraph[str]:
        """A read-only networkx view, keyed by address; inputs and weights by name, and "output" at the end.

        Node attributes: op, node. Edge attribute: arg (the schema name, the first if a value is read twice).
        """
        graph: nx.DiGraph[str] = nx.DiGraph()
        for node in self.graph.nodes:
            graph.add_node(label(node), op=ops.name(node) or node.op, node=node)
            named = ops.args(node) if node.op == "call_function" else dict(enumerate(node.args))
            for arg, value in reversed(list(named.items())):
                for read in _nodes_in(value):
                    graph.add_edge(label(read), label(node), arg=str(arg))
        frozen: nx.DiGraph[str] = nx.freeze(graph)
        return frozen


def _nodes_in(argument: fx.node.Argument) -> list[fx.Node]:
    return [leaf for leaf in tree_leaves(argument) if isinstance(leaf, fx.Node)]
