"""What a pass wrote into the table, held against the facts that it provides and the reasons that it gave."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from types import MappingProxyType

import torch

from dmqfx.checking.faked import unpacked
from dmqfx.checking.structure import is_quantized_layer, skip_of
from dmqfx.checking.tablecheck import Broken
from dmqfx.graph.address import Address, Site
from dmqfx.graph.facts import (
    CORRECTED,
    FITTED,
    FLAGGED,
    LEARNED,
    PAIRED,
    PLANNED,
    QDQ,
    ROUNDED,
    SHIFTED,
    STEPPED,
    Fact,
)
from dmqfx.graph.journal import Journal
from dmqfx.graph.modules import label
from dmqfx.graph.pipeline import Pass
from dmqfx.graph.program import Program
from dmqfx.graph.sites import quantized
from dmqfx.graph.table import Bias, ChannelScale, Codes, LayerPair, Planned, Shift, SkipConcat
from dmqfx.numbers.quant import QParams

__all__ = ["unaccounted"]

_ROUNDED = 1e-5  # of a binary logarithm: what single precision leaves of a step

_BEHIND: Mapping[type, Collection[Fact]] = MappingProxyType(
    {
        Planned: {PLANNED},
        SkipConcat: {FLAGGED},
        LayerPair: {PAIRED},
        ChannelScale: {LEARNED},
        Shift: {SHIFTED, FITTED, QDQ},
        Codes: {ROUNDED, STEPPED},
        Bias: {ROUNDED, CORRECTED, STEPPED},
        QParams: {FITTED, QDQ, STEPPED},
    }
)
"""The facts that entries of a kind are there for. A Range follows its tensor, which Headroom watches over."""


def unaccounted(before: Program, after: Program, step: Pass, journal: Journal) -> Iterator[Broken]:
    """Entries that were not the pass's to write, and those that it owes without a refusal that says why."""
    yield from _rewritten(before, after, step.provides | step.clears)
    if ROUNDED in step.requires & step.provides:
        yield from _overstepped(before, after)
    if STEPPED in step.provides:
        yield from _strayed(before, after)
    refused = {refusal.at for refusal in journal.refused}
    if FLAGGED in step.provides:
        yield from _unflagged(after, refused)
    if PAIRED in step.provides:
        yield from _unpaired(after, refused)
    if LEARNED in step.provides:
        yield from _unscaled(after, refused)


def _rewritten(before: Program, after: Program, free: frozenset[Fact]) -> Iterator[Broken]:
    """Entries of operations that are still there, added, changed or dropped behind the back of their fact."""
    guarded = {kind for kind, facts in _BEHIND.items() if not free & set(facts)}
    old, new = (
        {(site, type(entry)): entry for site, entry in program.table if type(entry) in guarded}
        for program in (before, after)
    )
    for site, kind in {**old, **new}:
        was, now = old.get((site, kind)), new.get((site, kind))
        if was is not now and was != now and site.at in before and site.at in after:
            names = " or ".join(sorted(repr(fact.name) for fact in _BEHIND[kind]))
            yield Broken(site, kind.__name__, f"written by a pass that does not provide the fact {names}")


def _overstepped(before: Program, after: Program) -> Iterator[Broken]:
    """Codes that a pass refined beyond the neighbours of those that it found, or gave other steps."""
    for site, now in after.table.of(Codes).items():
        was, planned = before.table.get(site, Codes), after.table.get(site, Planned)
        if was is None or was is now or planned is None or planned.spec is None:
            continue
        if not torch.equal(was.qparams.scale, now.qparams.scale):
            yield Broken(site, "Codes", "their steps are not those of the codes before")
            continue
        old, new = (unpacked(entry, planned.spec.bits) for entry in (was, now))
        if (most := float((new - old).abs().max())) > 1:
            yield Broken(site, "Codes", f"one was moved by {most:g} codes, past its neighbour")


def _strayed(before: Program, after: Program) -> Iterator[Broken]:
    """Codes and zero points that changed beside their steps, and steps that went too far."""
    for site, codes in after.table.of(Codes).items():
        if (was := before.table.get(site, Codes)) is None or was is codes:
            continue
        if not torch.equal(was.packed, codes.packed):
            yield Broken(site, "Codes", "codes were changed where only steps may be")
        yield from _too_far(site, "Codes", was.qparams, codes.qparams)
    for site, params in after.table.of(QParams).items():
        if (found := before.table.get(site, QParams)) is not None and found is not params:
            yield from _too_far(site, "QParams", found, params)


def _too_far(site: Site, kind: str, was: QParams, now: QParams) -> Iterator[Broken]:
    if not torch.equal(was.zero_point, now.zero_point):
        yield Broken(site, kind, "zero points were changed where only steps may be")
    elif was.scale.shape == now.scale.shape:
        farthest = float((now.scale / was.scale).log2().abs().max())
        if not farthest <= 1 + _ROUNDED:
            yield Broken(site, kind, f"a step went {2**farthest:.3g} times as far, more than 2")


def _unflagged(program: Program, refused: Collection[Address]) -> Iterator[Broken]:
    """Concatenations without an entry and a reason, and long skips without an entry."""
    for node in program.calls("cat"):
        site = Site(node.meta["address"], "tensors")
        if program.table.get(site, SkipConcat) is not None:
            continue
        if (skip := skip_of(node)) is not None:
            yield Broken(site, "SkipConcat", f"{label(skip)} is a long skip, but is not flagged")
        elif site.at not in refused:
            yield Broken(site, "SkipConcat", "the concatenation is neither flagged nor refused")


def _unpaired(program: Program, refused: Collection[Address]) -> Iterator[Broken]:
    """Quantized layers in no pair, though no reader of the same tensor was refused."""
    layers = [site for site in quantized(program) if is_quantized_layer(program, site)]
    paired = {reader for pair in program.table.of(LayerPair).values() for reader in pair.readers}
    excused = {program.source(site) for site in layers if site.at in refused}
    for site in layers:
        if site not in paired and program.source(site) not in excused:
            yield Broken(site, "LayerPair", "the layer is in no pair, and no refusal says why")


def _unscaled(program: Program, refused: Collection[Address]) -> Iterator[Broken]:
    """Pairs without a scale and a reason."""
    for site in program.table.of(LayerPair):
        if program.table.get(site, ChannelScale) is None and site.at not in refused:
            yield Broken(site, "ChannelScale", "the pair has no scale, and no refusal says why")
