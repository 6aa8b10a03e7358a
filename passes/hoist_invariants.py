"""hoist-invariants: what the sample does not change leaves the denoising loop, and is computed once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, fx

from dmqfx.graph import ops
from dmqfx.graph.facts import HOISTED, INTEGER, Fact
from dmqfx.graph.hoisting import between, hoisted_in, is_size, is_view, roots
from dmqfx.graph.inputs import InputSpec
from dmqfx.graph.modules import label
from dmqfx.graph.pipeline import Pass, PassContext, Preserves
from dmqfx.graph.program import Program
from dmqfx.graph.rewrite import Rewriter
from dmqfx.runtime.operators import OPS

GROUPED = ("scale", "zero_point", "x_scale", "x_zero_point", "shift", "out_scale", "out_zero_point")
Dependencies = Mapping[fx.Node, frozenset[str]]


@dataclass(frozen=True)
class HoistInvariants(Pass):
    """f(timestep), read by what depends on the sample too  ->  hoisted(f(timestep), by timestep), kept between calls.

    So with everything that depends on other inputs than the sample and residuals: the time embedding and its
    projections, keys and values of a context. A quantize and a layer whose parameters are the same in all timestep
    groups ask for no group, so that what they make of a context does not depend on the timestep.
    """

    requires: ClassVar[frozenset[Fact]] = frozenset({INTEGER})
    provides: ClassVar[frozenset[Fact]] = frozenset({HOISTED})
    forbids: ClassVar[frozenset[Fact]] = frozenset({HOISTED})
    preserves: ClassVar[Preserves] = Preserves.BITWISE

    def run(self, program: Program, ctx: PassContext) -> Program:
        """The program whose values are marked where they leave the loop."""
        rw = Rewriter(program, self.name(), ctx.journal)
        changing = _changing(program.inputs)
        _release(rw, changing)
        sizes, marks = list(filter(is_size, rw.graph.nodes)), list[fx.Node]()
        for node, readers in _frontier(rw, changing, marks):
            if not ctx.journal.apply(node.meta["address"], "hoist"):
                break
            _, by = between([node], [*marks, *sizes])
            with rw.graph.inserting_after(node):
                mark = rw.call(OPS.hoisted.default, near=node, x=node, by=[n for n in by if not is_size(n)])
            marks.append(mark)
            for reader in readers:
                rw.redirect(reader, node, mark)
        ctx.journal.note = _told(rw.graph)
        return rw.finish()


def _changing(inputs: InputSpec) -> frozenset[str]:
    """The inputs that are others at every step of a denoising loop."""
    return frozenset(i.name for i in inputs.inputs if i.name == "sample" or i.kind == "residual")


def _release(rw: Rewriter, changing: frozenset[str]) -> None:
    """Operations that depend on the timestep by their group alone do without, where all groups are alike."""
    known: dict[fx.Node, frozenset[str]] = {}
    for node in list(rw.graph.nodes):
        group = ops.args(node).get("group") if node.op == "call_function" else None
        if isinstance(group, fx.Node):
            others = _union(known, [read for read in node.all_input_nodes if read is not group])
            if others and not others & changing and not known[group] <= others:
                node = _ungrouped(rw, node)
        known[node] = _depends(node, known)


def _ungrouped(rw: Rewriter, node: fx.Node) -> fx.Node:
    """op(x, parameters [G, C], group)  ->  op(x, parameters [1, C]), if all rows are alike."""
    found = {
        arg: rw.value(read)
        for arg, read in ops.args(node).items()
        if arg in GROUPED and isinstance(read, fx.Node)
    }
    uneven = sorted(arg for arg, value in found.items() if not _alike(value))
    at = node.meta["address"]
    if uneven:
        rw.journal.refuse(
            at, "ungroup", f"{' and '.join(uneven)} differ between timestep groups; kept for each group"
        )
        return node
    if not rw.journal.apply(at, "ungroup", "the same in all timestep groups"):
        return node
    with rw.before(node):
        new = rw.like(node, group=None, **{arg: value[:1] for arg, value in found.items()})
    rw.replace(node, new)
    return new


def _alike(value: Tensor) -> bool:
    return bool((value == value[:1]).all())


def _frontier(
    rw: Rewriter, changing: frozenset[str], marks: Sequence[fx.Node]
) -> Iterator[tuple[fx.Node, Sequence[fx.Node]]]:
    """Values that do not change in a loop, and their readers that depend on more than they; in execution order.

    `marks` are those of the values that were yielded before.
    """
    known: dict[fx.Node, frozenset[str]] = {}
    for node in rw.graph.nodes:
        known[node] = _depends(node, known)
    found = False
    for node in list(rw.graph.nodes):
        readers = [reader for reader in node.users if known[reader] != known[node]]
        invariant = known[node] and not known[node] & changing
        if node.op == "call_function" and invariant and readers and isinstance(node.meta["val"], Tensor):
            found = True
            if why := _useless(node, marks):
                rw.journal.refuse(node.meta["address"], "hoist", why)
            else:
                yield node, readers
    if not found:
        first = next(node for node in rw.graph.nodes if "address" in node.meta)
        why = f"nothing is computed without {' and '.join(sorted(changing))}"
        rw.journal.refuse(first.meta["address"], "hoist", why)


def _useless(node: fx.Node, marks: Sequence[fx.Node]) -> str | None:
    """Why a value is not kept, or None."""
    inner, reads = between([node], marks)
    if all(is_view(each) for each in inner):
        return f"it is a view of {' and '.join(map(label, reads))}, which costs nothing"
    if _is_given(node):
        return "the caller gets it, and may write into it"
    return None


def _is_given(node: fx.Node) -> bool:
    """Whether the output may be the memory of a value."""
    return any(reader.op == "output" or (is_view(reader) and _is_given(reader)) for reader in node.users)


def _depends(node: fx.Node, known: Dependencies) -> frozenset[str]:
    """The inputs from which a node is computed; sizes of inputs are not."""
    if node.op == "placeholder":
        return frozenset({str(node.target)})
    return frozenset() if is_size(node) else _union(known, node.all_input_nodes)


def _union(known: Dependencies, nodes: Sequence[fx.Node]) -> frozenset[str]:
    return frozenset[str]().union(*(known.get(node, frozenset()) for node in nodes))


def _told(graph: fx.Graph) -> str:
    """How many operations left the loop, by what they depend on."""
    marks = hoisted_in(graph)
    every = [node for node in graph.nodes if node.op == "call_function" and node not in marks]
    groups: dict[frozenset[str], list[fx.Node]] = {}
    for mark in marks:
        groups.setdefault(roots(mark), []).append(ops.tensor(mark, "x"))
    counts = {
        " and ".join(sorted(names)): sum(
            n.op == "call_function" and not is_size(n) for n in between(ends, marks)[0]
        )
        for names, ends in groups.items()
    }
    parts = ", ".join(f"{count} by {names}" for names, count in counts.items())
    return f"{sum(counts.values())} of {len(every)} operations are hoisted{': ' * bool(parts)}{parts}"
