"""flag-skips: find the decoder's concatenations by the shape of the graph and measure their arms."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import networkx as nx
import torch
from torch import Tensor, fx

from dmqfx.errors import CalibrationError
from dmqfx.graph import ops
from dmqfx.graph.address import Site
from dmqfx.graph.facts import CANONICAL, FLAGGED, Fact
from dmqfx.graph.modules import label
from dmqfx.graph.pipeline import Pass, PassContext, Preserves
from dmqfx.graph.program import Program
from dmqfx.graph.rewrite import Refuse
from dmqfx.graph.table import SkipConcat
from dmqfx.sweep.finite import refuse_overflow


@dataclass(frozen=True)
class FlagSkips(Pass):
    """Record each long-skip concatenation and, with calibration, how uneven its channels are.

    The skip is the arm from which the other arm is made: from their last common value, the deep arm's own
    way leads through weights and the skip's own way through none.

    Units: rows of calibration to measure on; threshold on the relative inter-channel variance (see
    SkipConcat) from which a concatenation counts as uneven.
    """

    requires: ClassVar[frozenset[Fact]] = frozenset({CANONICAL})
    provides: ClassVar[frozenset[Fact]] = frozenset({FLAGGED})
    preserves: ClassVar[Preserves] = Preserves.BITWISE
    rows: int = 4
    threshold: float = 0.25

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise ValueError(f"rows must be at least 1, not {self.rows}")

    def run(self, program: Program, ctx: PassContext) -> Program:
        """Write a SkipConcat entry per concatenation found; refuse the others with a reason.

        Raises: CalibrationError if a value is not finite where arms are measured, naming the first operation.
        """
        graph = program.digraph()
        found: dict[Site, SkipConcat] = {}
        for node in ctx.journal.fuelled(list(program.calls("cat"))):
            outcome = _split(graph, node)
            if isinstance(outcome, Refuse):
                ctx.journal.refuse(node.meta["address"], "flag", outcome.reason)
            elif ctx.journal.apply(
                node.meta["address"], "flag", f"deep {outcome.deep} + skip {outcome.skip}"
            ):
                found[Site(node.meta["address"], "tensors")] = outcome
        if ctx.calibration is not None and found:
            found = self._measured(program, ctx, found)
        return program.with_table(program.table.put_all(found))

    def _measured(
        self, program: Program, ctx: PassContext, found: dict[Site, SkipConcat]
    ) -> dict[Site, SkipConcat]:
        peaks: dict[Site, list[Tensor]] = {site: [] for site in found}
        assert ctx.calibration is not None  # the caller looked
        chosen = ctx.calibration.select(self.rows, ctx.generator())
        for batch in chosen.batches(self.rows, program.inputs, dtype=program.dtype):
            _Peaks(program, peaks).run(*(batch[i.name].to(program.device) for i in program.inputs.inputs))
        measured = {site: torch.stack(values).amax(0) for site, values in peaks.items()}
        for site, peak in measured.items():
            if not bool(torch.isfinite(peak).all()):
                refuse_overflow(program, chosen)
                raise CalibrationError(f"{site}: calibration saw a value that is not finite")
        return {site: self._with_variance(entry, measured[site]) for site, entry in found.items()}

    def _with_variance(self, entry: SkipConcat, peak: Tensor) -> SkipConcat:
        first, second = peak[: _first(entry)], peak[_first(entry) :]
        deep, skip = (first, second) if entry.skip_last else (second, first)
        variances = _relative_variance(deep), _relative_variance(skip)
        return replace(
            entry,
            deep_variance=variances[0],
            skip_variance=variances[1],
            uneven=max(variances) >= self.threshold,
        )


class _Peaks(fx.Interpreter):
    """Runs the graph and notes the absolute maximum per channel of the flagged concatenations."""

    def __init__(self, program: Program, peaks: dict[Site, list[Tensor]]) -> None:
        super().__init__(program.gm)
        self.peaks = {site.at: values for site, values in peaks.items()}

    def run_node(self, n: fx.Node) -> object:
        with torch.no_grad():
            value = super().run_node(n)
        if n.meta.get("address") in self.peaks and isinstance(value, Tensor):
            self.peaks[n.meta["address"]].append(value.abs().amax(dim=(0, 2, 3)))
        return value


def _split(graph: nx.DiGraph[str], node: fx.Node) -> SkipConcat | Refuse:
    named = ops.args(node)
    arms = named["tensors"]
    if not isinstance(arms, (list, tuple)) or len(arms) != 2 or not all(isinstance(a, fx.Node) for a in arms):
        return Refuse(
            f"concatenates {len(arms) if isinstance(arms, (list, tuple)) else 1} tensors, a skip has two arms"
        )
    first, second = (a for a in arms if isinstance(a, fx.Node))
    shapes = [a.meta["val"].shape for a in (first, second)]
    if len(shapes[0]) != 4 or named["dim"] not in (1, -3):
        return Refuse("does not concatenate channels of feature maps [B, C, H, W]")
    ways = _own_convolutions(graph, first, second), _own_convolutions(graph, second, first)
    if bool(ways[0]) == bool(ways[1]):
        return Refuse("the arms are siblings: neither is made from the other on a longer way")
    skip_last = ways[0] > 0
    deep, skip = (shapes[0][1], shapes[1][1]) if skip_last else (shapes[1][1], shapes[0][1])
    return SkipConcat(deep=int(deep), skip=int(skip), skip_last=skip_last)


def _own_convolutions(graph: nx.DiGraph[str], arm: fx.Node, other: fx.Node) -> int:
    """How many convolutions continue, on the arm's own way, what both arms are made from by convolutions."""
    made, others = _upstream(graph, arm), _upstream(graph, other)
    trunk = {name for name in made & others if graph.nodes[name]["op"] == "conv2d"}
    reached = nx.multi_source_dijkstra_path_length(graph.subgraph(made), trunk) if trunk else {}
    return sum(1 for name in reached if name not in others and graph.nodes[name]["op"] == "conv2d")


def _upstream(graph: nx.DiGraph[str], node: fx.Node) -> set[str]:
    return {*nx.ancestors(graph, label(node)), label(node)}


def _first(entry: SkipConcat) -> int:
    return entry.deep if entry.skip_last else entry.skip


def _relative_variance(peak: Tensor) -> float:
    """Variance over channels divided by the squared mean: no unit, 0 for even channels."""
    mean = peak.double().mean()
    return float(peak.double().var(unbiased=False) / mean.square().clamp_min(1e-30))
