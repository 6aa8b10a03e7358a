"""The timestep group of every sample: one small node per set of boundaries, computed once per call."""

from __future__ import annotations

import torch
from torch import fx

import dmqfx.runtime.operators  # noqa: F401  # registers torch.ops.dmqfx
from dmqfx.errors import RewriteError
from dmqfx.graph.rewrite import Rewriter
from dmqfx.runtime.operators import OPS


class GroupIndex:
    """Group-index nodes of one rewriter, one per set of boundaries; the static case needs none."""

    def __init__(self, rw: Rewriter) -> None:
        self._rw = rw
        self._nodes: dict[tuple[float, ...], fx.Node] = {}

    def node(self, boundaries: tuple[float, ...], near: fx.Node) -> fx.Node | None:
        """The group index [B], or None where there is one group.

        Raises: RewriteError if the program has no timestep input.
        """
        if not boundaries:
            return None
        if boundaries not in self._nodes:
            self._nodes[boundaries] = self._make(boundaries, near)
        return self._nodes[boundaries]

    def _make(self, boundaries: tuple[float, ...], near: fx.Node) -> fx.Node:
        inputs = [n for n in self._rw.graph.nodes if n.op == "placeholder"]
        timestep = next((n for n in inputs if n.target == "timestep"), None)
        if timestep is None:
            raise RewriteError("timestep groups need a program with an input named timestep")
        with self._rw.graph.inserting_after(inputs[-1]):
            edges = self._rw.constant(
                "timestep_boundaries", torch.tensor(boundaries, dtype=timestep.meta["val"].dtype)
            )
        with self._rw.graph.inserting_after(edges):
            return self._rw.call(OPS.timestep_group.default, near=near, timestep=timestep, boundaries=edges)
