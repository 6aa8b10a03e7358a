"""insert-observers: identity observers at every planned activation site."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from dmqfx.graph import ops
from dmqfx.graph.address import Site
from dmqfx.graph.facts import CALIBRATED, FITTED, LEARNED, OBSERVED, PAIRED, PLANNED, QDQ, Fact
from dmqfx.graph.pipeline import Pass, PassContext, Preserves
from dmqfx.graph.program import Program
from dmqfx.graph.rewrite import Rewriter
from dmqfx.graph.sites import channel_axis, is_weight
from dmqfx.graph.table import Planned
from dmqfx.graph.timesteps import GroupIndex
from dmqfx.numbers.observers import Observer

Watched = dict[tuple[fx.Node, int, tuple[float, ...]], list[Site]]


@dataclass(frozen=True)
class InsertObservers(Pass):
    """x  ->  observe(x, group): sites that read one tensor on one axis share an observer.

    Ranges, and the scales learned from them, no longer count once observing has begun anew.
    """

    requires: ClassVar[frozenset[Fact]] = frozenset({PLANNED})
    provides: ClassVar[frozenset[Fact]] = frozenset({OBSERVED})
    clears: ClassVar[frozenset[Fact]] = frozenset({CALIBRATED, FITTED, PAIRED, LEARNED})
    forbids: ClassVar[frozenset[Fact]] = frozenset({QDQ})
    preserves: ClassVar[Preserves] = Preserves.BITWISE

    def run(self, program: Program, ctx: PassContext) -> Program:
        """One observer per (value, channel axis, timestep groups)."""
        rw = Rewriter(program, self.name(), ctx.journal)
        groups = GroupIndex(rw)
        for (_, axis, boundaries), sites in _watched(program).items():
            if not ctx.journal.apply(sites[0], "observe", f"read by {len(sites)}"):
                break
            first = rw.node(sites[0].at)
            x = ops.tensor(first, sites[0].arg)
            group = groups.node(boundaries, first)
            observer = Observer(str(sites[0]), axis=axis, boundaries=boundaries)
            with rw.before(first):
                name = f"observers_{len(ctx.journal.applied)}"
                seen = rw.observer(x, observer, name, sites[0].at, *([group] if group is not None else []))
            for site in sites:
                rw.redirect(rw.node(site.at), x, seen)
        return rw.finish()


def _watched(program: Program) -> Watched:
    found: Watched = {}
    for site, planned in program.table.of(Planned).items():
        if planned.spec is not None and not is_weight(site):
            key = (program.source(site), channel_axis(program, site), planned.spec.boundaries)
            found.setdefault(key, []).append(site)
    return found
