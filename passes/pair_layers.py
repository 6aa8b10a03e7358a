"""pair-layers: which quantized layers read one tensor, and therefore share one equivalent scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from dmqfx.graph.address import Site
from dmqfx.graph.channelwise import absorber
from dmqfx.graph.facts import PAIRED, PLANNED, QDQ, Fact
from dmqfx.graph.pipeline import Pass, PassContext, Preserves
from dmqfx.graph.program import Program
from dmqfx.graph.rewrite import Refuse
from dmqfx.graph.sites import channel_axis, readers
from dmqfx.graph.table import LayerPair, Planned


@dataclass(frozen=True)
class PairLayers(Pass):
    """One LayerPair per tensor that quantized layers read; it stands at the first reader's input site."""

    requires: ClassVar[frozenset[Fact]] = frozenset({PLANNED})
    provides: ClassVar[frozenset[Fact]] = frozenset({PAIRED})
    forbids: ClassVar[frozenset[Fact]] = frozenset({QDQ})
    preserves: ClassVar[Preserves] = Preserves.BITWISE

    def run(self, program: Program, ctx: PassContext) -> Program:
        """Group the input sites by what they read; say of each group who could absorb its scale."""
        table = program.table
        for source, sites in _by_source(program).items():
            unfit = _unfit(program, sites)
            if unfit is not None:
                ctx.journal.refuse(sites[0], "pair", unfit)
                continue
            if not ctx.journal.apply(sites[0], "pair", f"read by {len(sites)}"):
                break
            found = absorber(source, channel_axis(program, sites[0]), table)
            others = [user for user, _ in readers(source) if Site(user.meta["address"], "input") not in sites]
            if others and not isinstance(found, Refuse):
                found = Refuse(f"{others[0].meta['address']} reads the same tensor unscaled", others[0])
            producer = None if isinstance(found, Refuse) else found.node.meta["address"]
            reason = found.reason if isinstance(found, Refuse) else ""
            table = table.put(sites[0], LayerPair(tuple(sites), producer, reason))
        return program.with_table(table)


def _by_source(program: Program) -> dict[fx.Node, list[Site]]:
    """Planned input sites of layers whose weight is quantized too, by what they read."""
    found: dict[fx.Node, list[Site]] = {}
    plan = program.table.of(Planned)
    for site, planned in plan.items():
        weight = plan.get(Site(site.at, "weight"))
        if (
            site.arg == "input"
            and planned.spec is not None
            and weight is not None
            and weight.spec is not None
        ):
            found.setdefault(program.source(site), []).append(site)
    return found


def _unfit(program: Program, sites: list[Site]) -> str | None:
    """Why these readers cannot share a scale, or None."""
    if len({channel_axis(program, site) for site in sites}) > 1:
        return "the readers count channels on different axes"
    return None
