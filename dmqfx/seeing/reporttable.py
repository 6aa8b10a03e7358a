"""A report for a terminal: the summary, its timesteps, the table of its layers, and what was refused."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from dmqfx.seeing import wording
from dmqfx.seeing.report import LayerReport, SiteReport, badness

if TYPE_CHECKING:
    from dmqfx.seeing.report import Report

__all__ = ["refusals", "summary", "table", "timesteps"]

_SIDE_BY_SIDE = 10


def summary(report: Report) -> str:
    """Size, bits and loss, in a few lines."""
    return "\n".join(_summary(report))


def table(report: Report, *, worst_first: bool = False, limit: int | None = None) -> str:
    """A line for each layer; below it what is particular about it, and what was not as asked and why."""
    chosen = list(report.layers)
    if worst_first:
        chosen.sort(key=lambda layer: badness(layer.sqnr_db))
    chosen = chosen[:limit]
    rows = [["layer", "input", "weight", "SQNR dB", "before", "after", "MACs"], *map(_row, chosen)]
    lines = wording.columns(rows, right=frozenset({3, 4, 5, 6})).splitlines()
    told = [lines[0]]
    for layer, line in zip(chosen, lines[1:], strict=True):
        told += [line, *(f"  - {site.argument}: {text}" for site in layer.sites for text in site.notes)]
        told += [f"  ! {text}" for text in _differences(layer)]
    rest = len(report.layers) - len(chosen)
    return "\n".join([*told, *([f"... and {rest} more layers"] if rest else [])])


def timesteps(report: Report) -> str:
    """The output's SQNR in dB at each measured timestep, ten to a line; empty where nothing was measured."""
    cells = [(f"{time:g}", f"{db:.1f}") for time, db in report.output_db.items()]
    width = max((len(cell) for pair in cells for cell in pair), default=0)
    lines = []
    for start in range(0, len(cells), _SIDE_BY_SIDE):
        for name, row in zip(
            ("at t", "dB"), zip(*cells[start : start + _SIDE_BY_SIDE], strict=True), strict=True
        ):
            lines.append(f"{name:<6}" + "".join(f"  {cell:>{width}}" for cell in row))
    return "\n".join(lines)


def refusals(report: Report) -> str:
    """A line for each pass that refused something: how often, and the first of it."""
    rows = [["refused by", "", "the first"]]
    for done in report.passes:
        if done.refused:
            first = done.refused[0]
            rows.append([done.name, str(len(done.refused)), f"{first.address}: {first.reason}"])
    return wording.columns(rows, right={1}) if len(rows) > 1 else ""


def _summary(report: Report) -> Iterator[str]:
    before, after = max(report.bytes_before, 1), max(report.bytes_after, 1)
    factor, word = (before / after, "smaller") if before >= after else (after / before, "larger")
    changed = f", {wording.number(factor)}x {word}" if wording.number(factor) != "1" else ""
    yield f"{report.root}: {wording.size(report.bytes_before)} -> {wording.size(report.bytes_after)}{changed}"
    missed = report.asked - report.got
    yield f"bits    {report.got} of {report.asked} sites as asked" + (f", {missed} not" if missed else "")
    if not report.asked:
        yield "        nothing was asked to be quantized: every layer is float"
    elif report.idle:
        yield "        not one of them is quantized: every layer is float"
    if report.memory_only:
        yield "        only weights are quantized: memory only, no speed claim"
    yield f"loss    {_loss(report)}"
    broken = next(
        (layer.address for layer in report.layers if layer.sqnr_db is not None and math.isnan(layer.sqnr_db)),
        None,
    )
    if broken is not None:
        yield f"        NOT FINITE: {broken} is the first layer with inf or nan in its output"


def _loss(report: Report) -> str:
    if report.mean_db is None or report.worst is None:
        return "not measured"
    time, db = report.worst
    count = f"{len(report.output_db)} timestep{'s' * (len(report.output_db) > 1)}"
    if report.mean_db == math.inf:
        return f"none: the output is bit-equal at {count} ({report.rows} rows)"
    worst = f"worst {db:.1f} dB at t = {time:g} ({report.rows} rows)"
    return f"output SQNR {report.mean_db:.1f} dB in the mean of {count}, {worst}"


def _row(layer: LayerReport) -> list[str]:
    others = [site for site in layer.sites if site.argument not in ("input", "weight")]
    read, weight = layer.site("input"), layer.site("weight")
    inputs = "/".join(dict.fromkeys(map(_cell, others))) if others else _cell(read) if read else ""
    return [
        layer.address,
        inputs,
        _cell(weight) if weight is not None else "",
        "" if layer.sqnr_db is None else f"{layer.sqnr_db:.1f}",
        *(wording.size(count) if count else "" for count in (layer.bytes_before, layer.bytes_after)),
        f"{layer.macs_share:.1%}",
    ]


def _cell(site: SiteReport) -> str:
    return f"{site.got_bits or 'float'}{'' if site.as_asked else ' !'}"


def _differences(layer: LayerReport) -> Iterator[str]:
    for site in layer.sites:
        if not site.as_asked:
            why = "; ".join(site.reasons) or "no pass says why"
            yield f"{site.argument}: asked {site.asked}, got {site.got_bits or 'float'}: {why}"
