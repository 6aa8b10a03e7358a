"""Rows of embeddings: probes look few of them up, so a table that a pass changes is looked up whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from dmqfx.checking.judges import Finding, Inputs, Judge
from dmqfx.checking.probes import ROWS, small, unobserved
from dmqfx.graph import ops
from dmqfx.graph.program import Program

__all__ = ["EveryRow"]


class EveryRow(Judge):
    """The verdict of another judge on every label, or learned timestep, where an embedding is not as it was.

    So a pass may rewrite a table and make up for it elsewhere, and a table that it leaves alone costs no call.
    Embeddings of anything else than a label or a timestep are left to the probes.
    """

    def __init__(self, before: Program, probes: Sequence[Inputs], kind: Callable[..., Judge]) -> None:
        self.before, self.probes, self.kind = before, probes, kind
        self.lookups = list(_lookups(before))

    def judge(self, after: Program) -> Finding:
        now = list(_lookups(after))
        for k, was in enumerate(self.lookups):
            for part in was.unlike(now[k] if k < len(now) else None):
                probe = small(self.before, torch.Generator().manual_seed(0), was.name, part)
                finding = self.kind(self.before, [probe]).judge(after)
                if finding.wrong:
                    some = ", ".join(map(str, part[:3].tolist())) + (", ..." if len(part) > 3 else "")
                    return replace(finding, what=f"{finding.what} with {was.name} {some}")
        return Finding(0.0, 0.0, "difference of embeddings")


@dataclass(frozen=True, eq=False)
class _Lookup:
    """What an embedding makes of every number that an input may be.

    Shapes: rows [N, ...] for 0 to N - 1.
    """

    name: str
    rows: Tensor

    def unlike(self, other: _Lookup | None) -> list[Tensor]:
        """No number where every row is as it was; else all numbers in batches, those with other rows first."""
        every = torch.arange(len(self.rows))
        differ = torch.ones_like(every, dtype=torch.bool)
        if other is not None and (self.name, self.rows.shape) == (other.name, other.rows.shape):
            differ = (self.rows != other.rows).flatten(1).any(1).cpu()
        if not bool(differ.any()):
            return []
        return [
            part for rows in (every[differ], every[~differ]) for part in torch.split(rows, ROWS) if len(part)
        ]


def _lookups(program: Program) -> Iterator[_Lookup]:
    """One for each embedding whose index is made from a label or a timestep, in execution order."""
    counted = {i.name for i in program.inputs.inputs if i.kind in ("label", "timestep")}
    gm = unobserved(program)
    for node in gm.graph.nodes:
        if not ops.is_call(node, "embedding"):
            continue
        behind = _behind(node)
        table = ops.tensor(node, "weight").meta["val"]
        for name in sorted(counted & {str(each.target) for each in behind if each.op == "placeholder"}):
            inputs = small(program, torch.Generator().manual_seed(0), name, torch.arange(len(table)))
            with torch.no_grad():
                rows = _Part(gm, behind, node).run(*(inputs[i.name] for i in program.inputs.inputs))
            yield _Lookup(name, rows)


def _behind(node: fx.Node) -> set[fx.Node]:
    """A node and all that it is made from."""
    found, waiting = {node}, [node]
    while waiting:
        new = set(waiting.pop().all_input_nodes) - found
        found |= new
        waiting += new
    return found


class _Part(fx.Interpreter):
    """Runs some nodes of a graph, and gives the value of one of them."""

    def __init__(self, gm: fx.GraphModule, wanted: set[fx.Node], last: fx.Node) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.wanted, self.last = wanted, last

    def run_node(self, n: fx.Node) -> object:
        if n.op == "output":
            return self.env[self.last]
        return super().run_node(n) if n in self.wanted or n.op == "placeholder" else None
