"""In which order a sweep computes, decides and lets go: the graph cut behind every tensor to decide about."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import fx

from dmqfx.graph.address import Site
from dmqfx.graph.program import Program
from dmqfx.sweep.turn import Reader, turns

__all__ = ["TURN", "Moment", "Schedule", "Segment"]

Moment: TypeAlias = tuple[int, int]
"""When a value is read: the number of a segment, and of a chunk or TURN."""
TURN = sys.maxsize
"""Stands where a chunk's number would: the segment's turns come after all of its chunks."""


@dataclass(frozen=True, eq=False)
class Segment:
    """Operations up to the next tensor that planned layers read, that tensor included; then its turns.

    `spent` holds, for an operation, the values that no later one of this segment reads.
    """

    nodes: tuple[fx.Node, ...]
    source: fx.Node | None
    turns: tuple[tuple[int, tuple[Reader, ...]], ...]
    spent: dict[fx.Node, list[fx.Node]]


class Schedule:
    """The segments of a program whose sites are planned, and when each value is read."""

    def __init__(self, program: Program) -> None:
        self._varying = _varying(program.graph)
        self._inputs = [node for node in program.graph.nodes if node.op == "placeholder"]
        self._uses: dict[fx.Node, list[tuple[int, bool]]] = {}
        self.segments = tuple(self._segments(program))
        for k, segment in enumerate(self.segments):
            for read in dict.fromkeys(read for node in segment.nodes for read in self.reads(node)):
                self._uses.setdefault(read, []).append((k, False))
            if segment.source is not None:
                self._uses.setdefault(segment.source, []).append((k, True))

    @property
    def sites(self) -> list[Site]:
        """The turns in their order, each by its first reader's site."""
        return [readers[0].site for segment in self.segments for _, readers in segment.turns]

    @property
    def readers(self) -> list[Reader]:
        """Those of all turns."""
        return [reader for each in self.segments for _, readers in each.turns for reader in readers]

    def reads(self, node: fx.Node) -> list[fx.Node]:
        """The values that an operation reads, constants and what is computed from them alone left out."""
        return [read for read in node.all_input_nodes if read in self._varying]

    def next_use(self, node: fx.Node, chunk: int, now: Moment) -> Moment | None:
        """When a chunk of a value is read next, from a moment on; None if never."""
        moments = ((k, TURN if turn else chunk) for k, turn in self._uses.get(node, ()))
        return next((moment for moment in moments if moment >= now), None)

    def before(self, number: int) -> list[fx.Node]:
        """Inputs, and the operations of the segments up to and with this one."""
        return [*self._inputs, *(node for segment in self.segments[: number + 1] for node in segment.nodes)]

    @property
    def differing(self) -> set[fx.Node]:
        """Operations whose value a plan changes."""
        planned = {
            reader.site.at for each in self.segments for _, readers in each.turns for reader in readers
        }
        found: set[fx.Node] = set()
        for node in self.before(len(self.segments)):
            if node.meta.get("address") in planned or found & set(node.all_input_nodes):
                found.add(node)
        return found

    def _segments(self, program: Program) -> Iterator[Segment]:
        planned = turns(program)
        nodes: list[fx.Node] = []
        for node in program.graph.nodes:
            if node.op == "output" or (node.op in ("call_function", "call_module") and node in self._varying):
                nodes.append(node)
            if node in planned:
                yield Segment(tuple(nodes), node, tuple(planned[node]), self._spent(nodes))
                nodes = []
        if nodes:
            yield Segment(tuple(nodes), None, (), self._spent(nodes))

    def _spent(self, nodes: Sequence[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
        last = {read: node for node in nodes for read in self.reads(node)}
        found: dict[fx.Node, list[fx.Node]] = {}
        for read, node in last.items():
            found.setdefault(node, []).append(read)
        return found


def _varying(graph: fx.Graph) -> set[fx.Node]:
    """Everything but constants and what is computed from constants alone."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        computed = node.op != "get_attr" and (
            not node.all_input_nodes or bool(found & set(node.all_input_nodes))
        )
        if computed:
            found.add(node)
    return found
