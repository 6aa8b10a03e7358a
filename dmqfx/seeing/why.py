"""The life of one address: what was asked of it, what passes did and refused to do there, what it is now."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor

from dmqfx.graph.address import Address, Site
from dmqfx.graph.journal import PassRecord
from dmqfx.graph.program import Program
from dmqfx.graph.table import ChannelScale, Codes, LayerPair, Planned, Range
from dmqfx.numbers.quant import QParams
from dmqfx.seeing import wording
from dmqfx.seeing.bits import SiteBits, is_quantized, site_bits
from dmqfx.seeing.given import Seen, program_of
from dmqfx.seeing.lines import Line, lines
from dmqfx.seeing.selection import find

__all__ = ["why"]

_TOLD = (Planned, Range, QParams, Codes, ChannelScale, LayerPair)


def why(program: Seen, address: str) -> str:
    """The life of one operation: its call, its bits and who decided them, where its numbers come from, and
    every rewrite made or refused there.

    Raises: AddressError with the three nearest, for an address that neither the program nor its log knows;
        NotAProgramError.
    Example:
        >>> import torch
        >>> from torch import fx
        >>> from dmqfx.graph.inputs import Input, InputSpec
        >>> from dmqfx.graph.modules import build, propagate
        >>> graph = fx.Graph()
        >>> silu = graph.call_function(torch.ops.aten.silu.default, (graph.placeholder("sample"),))
        >>> silu.meta["address"] = Address("act", "silu")
        >>> _ = graph.output(silu)
        >>> gm, spec = build(graph, {}), InputSpec("Toy", (Input("sample", ("B", 3)),), {"B": 2})
        >>> propagate(gm, spec)
        >>> program = Program(gm, spec)
        >>> print(why(program, "act/silu"))
        act/silu
          silu(self=sample) -> [2, 3]
          passes
            none rewrote or refused anything here
    """
    seen = program_of(program, "why")
    known = lines(seen)
    logged = [each.at for done in seen.log for each in done.applied]
    at = find([*known, *logged], address)
    told = [str(at)]
    if at in known:
        told.append(f"  {known[at].call}")
        told += [f"  {line}" for site in _sites(seen, known[at]) for line in _site(seen, site)]
    else:
        told.append("  is no longer in the graph")
    made = at.made_by.rpartition(".")[0]
    told += [f"  made by the pass {made}"] if made else []
    passes = [f"    {line}" for done in seen.log for line in _record(done, at)]
    return "\n".join([*told, "  passes", *(passes or ["    none rewrote or refused anything here"])])


def _sites(program: Program, line: Line) -> list[Site]:
    """Sites of an operation that anything is known of, in the order of its arguments."""
    arguments = list(line.arguments)
    known = dict.fromkeys(
        [*(s for s in program.table.sites() if s.at == line.at), *_paired(program, line.at)]
    )
    return sorted(known, key=lambda s: arguments.index(s.arg) if s.arg in arguments else len(arguments))


def _paired(program: Program, at: Address) -> Iterator[Site]:
    for pair in program.table.of(LayerPair).values():
        yield from (reader for reader in pair.readers if reader.at == at)


def _site(program: Program, site: Site) -> Iterator[str]:
    yield site.arg
    bits = site_bits(program, site)
    if bits.run_time or program.table.get(site, Planned) is not None:
        yield from (f"  {line}" for line in _bits(program, bits))
    yield from (f"  {line}" for line in _numbers(program, site))
    told = {type(each): each for each in program.table.at(site) if not isinstance(each, _TOLD)}
    yield from (f"  {wording.entry(each)}" for each in told.values())


def _bits(program: Program, bits: SiteBits) -> Iterator[str]:
    by = bits.rule if bits.run_time else f"rule {bits.rule!r}"
    yield f"asked  {bits.asked or (f'{bits.run_time} bit' if bits.run_time else 'float')}, by {by}"
    yield f"got    {f'{bits.got} bit, ' if bits.got else ''}{bits.how}"
    if is_quantized(program) and not bits.as_asked:
        yield from (f"       refused by {reason}" for reason in bits.refused)
        if not bits.refused:
            yield "       not what was asked, and no pass says why"


def _numbers(program: Program, site: Site) -> Iterator[str]:
    """Where a scale came from: range by timestep group, codes, equivalent scale."""
    yield from _groups(program.table.get(site, Range), program.table.get(site, QParams))
    codes = program.table.get(site, Codes)
    if codes is not None:
        yield f"codes  {wording.entry(codes)}, {wording.size(codes.packed.numel())} packed"
    for owner, pair in program.table.of(LayerPair).items():
        if site in pair.readers:
            yield f"pair   {wording.entry(pair)}" + (f", kept at {owner}" if owner != site else "")
            scale = program.table.get(owner, ChannelScale)
            if scale is not None:
                channels = f"{scale.gamma.numel()} channel{'s' * (scale.gamma.numel() > 1)}"
                yield f"gamma  {wording.entry(scale).removeprefix('gamma ')} over {channels}"


def _groups(seen: Range | None, params: QParams | None) -> Iterator[str]:
    """A line for each timestep group: what calibration saw there, if that is known, and the scale that follows.

    A saved model has scales and no ranges.
    """
    known = seen or params
    for g, span in enumerate(_spans(known.boundaries) if known is not None else ()):
        words = [f"seen   {span}" if seen is not None else f"used   {span}"]
        if seen is not None:
            words.append(f"range {wording.interval(seen.low[g], seen.high[g])}")
        if params is not None:
            one = g if len(params.scale) > 1 else 0
            words.append(f"scale {_spread(params.scale[one])}  zero point {_spread(params.zero_point[one])}")
        if seen is not None:
            count = int(seen.count[g])
            words.append(f"{count} values" if count else "no rows: taken from the nearest group")
        yield "  ".join(words)


def _spans(boundaries: tuple[float, ...]) -> list[str]:
    """What each timestep group holds: a boundary belongs to the group above it."""
    if not boundaries:
        return ["all timesteps"]
    words = [wording.number(b) for b in boundaries]
    inner = [f"{low} <= t < {high}" for low, high in pairwise(words)]
    spans = [f"t < {words[0]}", *inner, f"{words[-1]} <= t"]
    return [span.rjust(max(map(len, spans))) for span in spans]


def _spread(values: Tensor) -> str:
    low, high = values.min().item(), values.max().item()
    return wording.number(low) if low == high else f"{wording.number(low)}..{wording.number(high)}"


def _record(done: PassRecord, at: Address) -> Iterator[str]:
    for each in done.applied:
        if each.at == at:
            yield f"{done.name:<18} {each.rule}" + (f": {each.what}" if each.what else "")
    for refusal in done.refused:
        if refusal.at == at:
            yield f"{done.name:<18} {refusal.rule} refused: {refusal.reason}"
