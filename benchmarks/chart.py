"""A chart of dots as SVG: a line for each name, a panel for each measure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape

NAMES, PANEL, LINE, TOP, GAP = 260, 300, 26, 70, 40
INK, FAINT, GRID, MEAN, SEED = "#30343b", "#767c86", "#dfe2e6", "#3f74b8", "#9db8d9"


def dots(title: str, names: Sequence[str], panels: Mapping[str, Sequence[Sequence[float]]]) -> str:
    """SVG text: small dots are the values of a name, the large one their mean.

    Example:
        >>> dots("t", ["a"], {"x": [[1.0, 2.0]]}).count("<circle")
        3
    """
    width, height = NAMES + len(panels) * (PANEL + GAP), TOP + len(names) * LINE + 40
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="system-ui, sans-serif" font-size="13">',
        f'<rect width="100%" height="100%" fill="#ffffff"/>{_text(12, 26, title, INK)}',
        *(_text(NAMES - 16, _y(k) + 4, name, INK, "end") for k, name in enumerate(names)),
    ]
    for k, (words, rows) in enumerate(panels.items()):
        lines += _panel(NAMES + k * (PANEL + GAP), words, rows)
    return "\n".join([*lines, "</svg>\n"])


def _panel(left: int, words: str, rows: Sequence[Sequence[float]]) -> Iterator[str]:
    values = [value for row in rows for value in row if math.isfinite(value)] or [0.0]
    low, high = math.floor(min(values)), math.ceil(max(values)) + (min(values) == max(values))
    step = max(1, math.ceil((high - low) / 6))

    def x(value: float) -> float:
        return left + PANEL * (value - low) / (high - low)

    yield _text(left, TOP - 16, words, FAINT)
    bottom = _y(len(rows) - 1) + LINE / 2
    for tick in range(low, high + 1, step):
        yield f'<path d="M{x(tick):.1f} {TOP}V{bottom:.1f}" stroke="{GRID}"/>'
        yield _text(x(tick), bottom + 16, str(tick), FAINT, "middle")
    for k, row in enumerate(rows):
        finite = [value for value in row if math.isfinite(value)]
        yield from (f'<circle cx="{x(v):.1f}" cy="{_y(k)}" r="3" fill="{SEED}"/>' for v in finite)
        if finite:
            mean = sum(finite) / len(finite)
            about = escape(f"mean {mean:.2f}")
            circle = f'<circle cx="{x(mean):.1f}" cy="{_y(k)}" r="5" fill="{MEAN}"'
            yield f"{circle}><title>{about}</title></circle>"


def _y(row: int) -> float:
    return TOP + LINE * (row + 0.5)


def _text(x: float, y: float, words: str, colour: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" text-anchor="{anchor}">{escape(words)}</text>'
