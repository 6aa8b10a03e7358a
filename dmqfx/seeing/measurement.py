"""Measuring a compilation: two programs become a Report."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import torch
from torch import fx
from tqdm import tqdm

from dmqfx.graph.address import Address
from dmqfx.graph.facts import SCALED
from dmqfx.graph.journal import PassRecord
from dmqfx.graph.modules import constant, is_fixed
from dmqfx.graph.program import Program
from dmqfx.graph.table import LayerPair
from dmqfx.seeing.bits import SiteBits, layers, site_bits, sites
from dmqfx.seeing.inventory import macs
from dmqfx.seeing.lockstep import Ratio, Tally, compare
from dmqfx.seeing.report import LayerReport, PassReport, Refused, Report, SiteReport

if TYPE_CHECKING:
    from dmqfx.calibration.calibration import Calibration

__all__ = ["measure", "selected"]

_BATCH = 4


def measure(
    before: Program, after: Program, calibration: Calibration | None, *, rows: int, progress: bool
) -> Report:
    """The report of `after`, compared with `before`; see Report.measure."""
    found = layers(before)
    tally, measured = Tally(), 0
    if calibration is not None and rows > 0:
        common = found.keys() & layers(after).keys() - _rescaled(before, after)
        tally, measured = _tally(before, after, calibration, rows, common, progress)
    counts = {at: macs(node) // before.inputs.sizes.get("B", 1) for at, node in found.items()}
    total = max(sum(counts.values()), 1)
    return Report(
        root=before.inputs.root,
        layers=tuple(_layer(before, after, at, tally, counts[at], counts[at] / total) for at in found),
        output_db={time: tally.outputs[time].db for time in sorted(tally.outputs, reverse=True)},
        rows=measured,
        bytes_before=_size(before, before.weights()),
        bytes_after=_size(after, after.weights()),
        passes=tuple(map(_pass, after.log)),
    )


def selected(calibration: Calibration, rows: int) -> Calibration:
    """What is measured on: so many rows, and at least one of every timestep."""
    wanted = max(rows, len(set(calibration.timesteps().tolist())))
    return calibration.select(wanted, torch.Generator().manual_seed(0))


def _tally(
    before: Program,
    after: Program,
    calibration: Calibration,
    rows: int,
    common: Collection[Address],
    progress: bool,
) -> tuple[Tally, int]:
    """Both programs on a selection of rows, and how many these are."""
    chosen, tally = selected(calibration, rows), Tally()
    with tqdm(total=len(chosen), desc="measure", unit="row", disable=not progress) as bar:
        for batch in chosen.batches(_BATCH):
            compare(before, after, batch, common, tally)
            bar.update(len(batch["timestep"]))
    return tally, len(chosen)


def _rescaled(before: Program, after: Program) -> set[Address]:
    """Layers whose numbers an absorbed equivalent scale may have changed on the way: the producers
    that took it in, and what lies between them and the readers.
    """
    if SCALED in before.facts or SCALED not in after.facts:
        return set()
    found: set[fx.Node] = set()
    for pair in after.table.of(LayerPair).values():
        if pair.producer is not None and pair.producer in after:
            producer, readers = after.node(pair.producer), {after.node(each.at) for each in pair.readers}
            found |= _between(after.graph, producer, readers)
    return {at for at, node in layers(after).items() if node in found}


def _between(graph: fx.Graph, producer: fx.Node, readers: set[fx.Node]) -> set[fx.Node]:
    """The producer, and what is made from it and read by the readers at any distance."""
    made, read = {producer}, set(readers)
    for node in graph.nodes:
        if not made.isdisjoint(node.all_input_nodes):
            made.add(node)
    for node in reversed(graph.nodes):
        if node in read:
            read.update(node.all_input_nodes)
    return (made & read) - readers


def _layer(
    before: Program, after: Program, at: Address, tally: Tally, macs: int, share: float
) -> LayerReport:
    ratios = tally.layers.get(at, {})
    return LayerReport(
        address=str(at),
        sites=tuple(_site(site_bits(after, site)) for site in sites(at) if at in after),
        sqnr_db=Ratio.of_all(ratios.values()).db if ratios else None,
        timestep_db={time: ratios[time].db for time in sorted(ratios, reverse=True)},
        bytes_before=_size(before, _constants(before.node(at))),
        bytes_after=_size(after, _constants(after.node(at))) if at in after else 0,
        macs=macs,
        macs_share=share,
    )


def _site(found: SiteBits) -> SiteReport:
    return SiteReport(
        argument=found.site.arg,
        asked_bits=found.asked_bits,
        got_bits=found.got,
        asked=found.how if found.run_time else str(found.asked or "float"),
        rule=found.rule,
        reasons=found.refused,
        notes=found.notes,
    )


def _constants(node: fx.Node) -> set[str]:
    """The constants that an operation reads, straight or through operations on constants alone."""
    return {name for read in node.all_input_nodes if is_fixed(read) for name in _behind(read)}


def _behind(node: fx.Node) -> set[str]:
    """The constants that a fixed value is made of."""
    return (
        {str(node.target)} if node.op == "get_attr" else {n for r in node.all_input_nodes for n in _behind(r)}
    )


def _size(program: Program, names: Collection[str]) -> int:
    """Bytes of these constants."""
    return sum(t.numel() * t.element_size() for t in (constant(program.gm, name) for name in names))


def _pass(done: PassRecord) -> PassReport:
    refused = tuple(Refused(str(each.at), each.rule, each.reason) for each in done.refused)
    return PassReport(done.name, done.preserves, len(done.applied), refused, done.seconds, done.drift)
