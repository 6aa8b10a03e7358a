"""The picture of a program: its layers on a U, coloured by bits, as SVG."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby, pairwise
from typing import TYPE_CHECKING

from dmqfx.graph.program import Program
from dmqfx.policy.policy import KIND_OF_OPERATOR
from dmqfx.seeing import wording
from dmqfx.seeing.bits import is_quantized
from dmqfx.seeing.given import Seen, program_of
from dmqfx.seeing.inventory import Item, inventory
from dmqfx.seeing.report import badness
from dmqfx.seeing.ushape import Arc, Lane, Unit, UShape, u_shape

if TYPE_CHECKING:
    from dmqfx.seeing.report import LayerReport, Report

__all__ = ["picture"]

Bits = tuple[int | None, ...]

_COLOURS: Mapping[int | None, str] = {
    8: "#3f74b8",
    7: "#4c9bc4",
    6: "#43ab9b",
    5: "#9bbf5c",
    4: "#f1b53d",
    3: "#e87f36",
    2: "#c7403f",
    None: "#d3d6db",
}
_INK, _FAINT, _PAPER, _CARD, _EDGE = "#30343b", "#767c86", "#ffffff", "#f6f7f8", "#dfe2e6"
_ARC, _UNEVEN, _ALARM = "#aab0b9", "#a05bb5", "#d11f2f"
_FONT = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"
_MARGIN, _LEGEND, _SMALLEST_WIDTH = 24.0, 58.0, 800.0


@dataclass(frozen=True)
class _Mark:
    """How one layer is drawn: its kind, the bits of its sites from top to bottom, and its tooltip."""

    kind: str
    bits: Bits
    as_asked: bool
    words: str


def picture(program: Seen, report: Report | None = None) -> str:
    """The U as SVG text: x is execution order, y is resolution, arcs are skips, colours are bits.

    Colours are the bits in the graph or, before any are there, the planned ones. Tooltips give address,
    shape, bits and, with a report, SQNR. Arcs are the skips that flag-skips has found.

    Raises: NotAProgramError.
    Example:
        >>> import torch
        >>> from torch import fx
        >>> from dmqfx.graph.address import Address
        >>> from dmqfx.graph.inputs import Input, InputSpec
        >>> from dmqfx.graph.modules import build, propagate
        >>> graph = fx.Graph()
        >>> silu = graph.call_function(torch.ops.aten.silu.default, (graph.placeholder("sample"),))
        >>> silu.meta["address"] = Address("act", "silu")
        >>> _ = graph.output(silu)
        >>> gm, spec = build(graph, {}), InputSpec("Toy", (Input("sample", ("B", 3)),), {"B": 2})
        >>> propagate(gm, spec)
        >>> program = Program(gm, spec)
        >>> picture(program).startswith('<svg xmlns="http://www.w3.org/2000/svg"')
        True
    """
    seen = program_of(program, "picture")
    place = u_shape(seen)
    known = {layer.address: layer for layer in report.layers} if report is not None else {}
    marks = {
        str(item.address): _mark(item, is_quantized(seen), known.get(str(item.address)))
        for item in inventory(seen)
        if item.sites
    }
    width, height = max(place.width, _SMALLEST_WIDTH), place.bottom + _LEGEND
    body = [
        *_header(seen, marks, report),
        *(_lane(lane, width) for lane in place.lanes),
        *_trunk(place),
        *map(_arc, place.arcs),
        *_blocks(place),
        *(line for unit in place.units for line in _unit(unit, marks)),
        *_legend(marks, place.arcs, place.bottom + 30),
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
            f'viewBox="0 0 {width:.0f} {height:.0f}" font-family="{_FONT}" role="img">',
            f"<title>{escape(seen.inputs.root)}: bits of its layers</title>",
            "<defs>",
            *_gradients(marks),
            "</defs>",
            f'<rect width="100%" height="100%" fill="{_PAPER}"/>',
            *body,
            "</svg>\n",
        ]
    )


def _mark(item: Item, quantized: bool, measured: LayerReport | None) -> _Mark:
    bits = tuple(s.got if quantized else s.asked.bits if s.asked else None for s in item.sites)
    said = [
        f"{s.site.arg}: {f'{b} bit' if b else 'float'}" + (f" (rule {s.rule})" if s.rule else "")
        for s, b in zip(item.sites, bits, strict=True)
    ]
    said += [f"{s.site.arg}: {note}" for s in item.sites for note in s.notes]
    refused = [f"refused: {reason}" for s in item.sites for reason in s.refused]
    output = "x".join(map(str, item.shape[1:]))
    weight = f", weight {'x'.join(map(str, item.weight))}" if item.weight else ""
    lines = [str(item.address), f"output {output}{weight}, {item.share:.1%} of MACs", *said, *refused]
    if measured is not None and measured.sqnr_db is not None:
        lines.append(f"SQNR {measured.sqnr_db:.1f} dB" + _worst(measured))
    as_asked = all(s.as_asked for s in item.sites) if quantized else not refused
    return _Mark(KIND_OF_OPERATOR[item.address.op], bits, as_asked, "\n".join(lines))


def _worst(measured: LayerReport) -> str:
    """The timestep at which a layer is farthest from float."""
    if len(measured.timestep_db) < 2:
        return ""
    time, db = min(measured.timestep_db.items(), key=lambda each: badness(each[1]))
    return f", worst {db:.1f} dB at t = {time:g}"


def _header(program: Program, marks: Mapping[str, _Mark], report: Report | None) -> Iterator[str]:
    height, width = (program.inputs.sizes.get(side, 0) for side in "HW")
    parts = [f"{len(marks)} layers at {height} x {width}"]
    for k, name in enumerate(("inputs", "weights")):
        counts = Counter(mark.bits[k] for mark in marks.values() if mark.kind != "attention")
        each = (f"{counts[b]} {f'at {b} bit' if b else 'float'}" for b in _COLOURS if counts[b])
        parts.append(f"{name}: {', '.join(each)}")
    if report is not None:
        parts.append(f"{wording.size(report.bytes_before)} to {wording.size(report.bytes_after)}")
        parts += [f"output SQNR {report.mean_db:.1f} dB"] if report.mean_db is not None else []
    yield _text(_MARGIN, 34, program.inputs.root, size=17, weight="600")
    yield _text(_MARGIN, 54, "   ·   ".join(parts), size=12, fill=_FAINT)


def _lane(lane: Lane, width: float) -> str:
    name = f"{lane.size[0]} x {lane.size[1]}" if lane.size is not None else "vectors"
    line = f'<line x1="{_MARGIN}" y1="{lane.bottom:.1f}" x2="{width - _MARGIN}" y2="{lane.bottom:.1f}" '
    return f'{line}stroke="{_EDGE}" stroke-dasharray="1 4"/>\n' + _text(
        _MARGIN, lane.middle + 4, name, fill=_FAINT
    )


def _trunk(place: UShape) -> Iterator[str]:
    """The way from unit to unit: straight in a lane, an S from lane to lane."""
    for one, two in pairwise(place.units):
        (_, y), (_, v) = one.middle, two.middle
        x, u = one.x + one.width, two.x
        bend = f"C{(x + u) / 2:.1f} {y:.1f} {(x + u) / 2:.1f} {v:.1f}" if y != v else "L"
        way = f"M{x:.1f} {y:.1f}{bend} {u:.1f} {v:.1f}"
        yield f'<path d="{way}" fill="none" stroke="{_EDGE}" stroke-width="3"/>'


def _arc(arc: Arc) -> str:
    """A bridge with round corners and an arrow head."""
    x, u, r = arc.source.middle[0], arc.target.middle[0], 6.0
    colour = _UNEVEN if arc.entry.uneven else _ARC
    up, down = f"M{x:.1f} {arc.source.y:.1f}V{arc.y + r:.1f}", f"V{arc.target.y - 1:.1f}"
    way = f"{up}q0 {-r} {r} {-r}H{u - r:.1f}q{r} 0 {r} {r}{down}"
    head = f"M{u - 3:.1f} {arc.target.y - 5:.1f}h6l-3 5z"
    words = escape(f"{arc.at}\n{wording.entry(arc.entry)}")
    return (
        f'<g stroke="{colour}" stroke-width="1.4"><title>{words}</title><path d="{way}" fill="none"/>'
        f'<path d="{head}" fill="{colour}" stroke="none"/></g>'
    )


def _blocks(place: UShape) -> Iterator[str]:
    """A name and a bracket under the units of a block, in each lane where it has more than its sampler.

    Where names would overlap, the wider block has its own.
    """
    bottoms = {lane.size: lane.bottom for lane in place.lanes}
    runs = [list(run) for _, run in groupby(place.units, key=lambda unit: (unit.block, unit.size))]
    taken: list[tuple[float, float, float]] = []
    for units in sorted(runs, key=lambda units: units[0].x - units[-1].x - units[-1].width):
        block, y = units[0].block, bottoms[units[0].size] - 17
        left, right = units[0].x, units[-1].x + units[-1].width
        middle, half = (left + right) / 2, 3.0 * len(block)
        free = all(y != v or middle + half < low or high < middle - half for low, high, v in taken)
        if free and (len(units) > 1 or len(units[0].layers) > 1 or units[0].name == block):
            taken.append((middle - half, middle + half, y))
            yield f'<path d="M{left:.1f} {y:.1f}v3H{right:.1f}v-3" fill="none" stroke="{_EDGE}"/>'
            yield _text(middle, y + 13, block, size=9, fill=_FAINT, anchor="middle")


def _unit(unit: Unit, marks: Mapping[str, _Mark]) -> Iterator[str]:
    yield (
        f'<rect x="{unit.x:.1f}" y="{unit.y:.1f}" width="{unit.width:.1f}" height="{unit.height:.1f}" rx="4" '
        f'fill="{_CARD}" stroke="{_EDGE}"><title>{escape(unit.name)}</title></rect>'
    )
    for at, x, y in unit.cells():
        yield _glyph(marks[str(at)], x, y)


def _glyph(mark: _Mark, x: float, y: float) -> str:
    """Square, circle or diamond, filled by the bits of its sites from top to bottom."""
    edge = f' stroke="{_ALARM}" stroke-width="1.8"' if not mark.as_asked else ""
    look = f'fill="url(#{_key(mark.bits)})"{edge}'
    title = f"<title>{escape(mark.words)}</title>" if mark.words else ""
    if mark.kind == "conv2d":
        corner = f'x="{x - 5.2:.1f}" y="{y - 5.2:.1f}"'
        return f'<rect {corner} width="10.4" height="10.4" rx="1.5" {look}>{title}</rect>'
    if mark.kind == "linear":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5.4" {look}>{title}</circle>'
    return f'<path d="M{x:.1f} {y - 6.6:.1f}l6.6 6.6l-6.6 6.6l-6.6 -6.6z" {look}>{title}</path>'


def _gradients(marks: Mapping[str, _Mark]) -> Iterator[str]:
    """A fill for every combination of bits that occurs: hard stripes from top to bottom."""
    for bits in dict.fromkeys([*(mark.bits for mark in marks.values()), (None,), *((b,) for b in _COLOURS)]):
        stops = "".join(
            f'<stop offset="{k / len(bits):.4f}" stop-color="{_colour(b)}"/>'
            f'<stop offset="{(k + 1) / len(bits):.4f}" stop-color="{_colour(b)}"/>'
            for k, b in enumerate(bits)
        )
        yield f'<linearGradient id="{_key(bits)}" x1="0" y1="0" x2="0" y2="1">{stops}</linearGradient>'


def _legend(marks: Mapping[str, _Mark], arcs: Sequence[Arc], y: float) -> Iterator[str]:
    there = {bits for mark in marks.values() for bits in mark.bits}
    kinds = {"conv2d": "convolution", "linear": "linear", "attention": "attention"}
    entries = [(_Mark(kind, (None,), True, ""), words) for kind, words in kinds.items()]
    entries += [
        (_Mark("conv2d", (b,), True, ""), f"{b} bit" if b else "float") for b in _COLOURS if b in there
    ]
    x = _MARGIN + 6
    for mark, words in entries:
        yield _glyph(mark, x, y)
        yield _text(x + 11, y + 4, words, fill=_FAINT)
        x += 30 + 6.2 * len(words)
    notes = ["upper half: input, lower half: weight"]
    notes += ["arcs: long skips"] if arcs else []
    notes += ["purple: uneven channels"] if any(arc.entry.uneven for arc in arcs) else []
    notes += ["red edge: not as asked"] if not all(mark.as_asked for mark in marks.values()) else []
    yield _text(x, y + 4, "   ·   ".join(notes), fill=_FAINT)


def _key(bits: Bits) -> str:
    return "b" + "-".join(str(b or "f") for b in bits)


def _colour(bits: int | None) -> str:
    return _COLOURS.get(bits, _INK)


def _text(
    x: float, y: float, words: str, *, size: int = 11, fill: str = _INK, weight: str = "", anchor: str = ""
) -> str:
    more = (f' font-weight="{weight}"' if weight else "") + (f' text-anchor="{anchor}"' if anchor else "")
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{fill}"{more}>{escape(words)}</text>'
