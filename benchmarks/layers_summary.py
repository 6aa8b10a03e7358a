"""What bench_layers.py found, told for all layers together."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

__all__ = ["summary"]

PEERS = ("float32", "oneDNN int8", "fbgemm int8")
FASTER = "the faster int8"
IN_FLOAT = ("linear 1x", "conv3x3/1 4->", "conv3x3/1 320->4 ")  # by policy: the time path and both ends
MOST_WORK = 0.8

Row = dict[str, Any]


def summary(rows: Sequence[Row]) -> dict[str, dict[str, object]]:
    """Of each way: seconds of all layers as often as they occur, rates over those of each peer and who is slower.

    Rates are the best of all turns, their ratios geometric means over the shapes that both have: of all, and of those that
    policies quantize, which leaves out the time path's layers of one row and both ends. fbgemm gives codes, so what is held
    against it does too, where there is such a way. `of_peak` is of the shapes with most work that have 80 % of it together.
    """
    names = dict.fromkeys(name for row in rows for name in row["ways"])
    return {
        name: _told(rows, name)
        for name in names
        if not name.endswith(", codes") and name != "float32 channels last"
    }


def _told(rows: Sequence[Row], name: str) -> dict[str, object]:
    told: dict[str, object] = {"seconds": round(_seconds(rows, name), 2)}
    over = {peer: _ratios(rows, name, peer) for peer in PEERS}
    both = over[PEERS[1]].keys() & over[PEERS[2]].keys()
    over[FASTER] = {layer: min(over[peer][layer] for peer in PEERS[1:]) for layer in both}
    for peer, ratios in over.items():
        quantized = [ratio for layer, ratio in ratios.items() if not layer.startswith(IN_FLOAT)]
        for what, found in ((f"over {peer}", list(ratios.values())), (f"over {peer}, quantized", quantized)):
            if found:
                told[what] = round(statistics.geometric_mean(found), 2)
        if name not in PEERS and (slower := sorted(layer for layer, ratio in ratios.items() if ratio < 1)):
            told[f"slower than {peer}"] = slower
        if ratios and len(ratios) < len(rows):
            told[f"shapes of {peer}"] = len(ratios)
    shares = [
        share for row in _largest(rows) if (share := row["ways"].get(name, {}).get("of_peak")) is not None
    ]
    if shares:
        told["of_peak"] = {
            "least": min(shares), "most": max(shares), "0.7 and more": sum(x >= 0.7 for x in shares), "of": len(shares),
        }  # fmt: skip
    return told


def _ratios(rows: Sequence[Row], name: str, peer: str) -> dict[str, float]:
    """Of each layer that both have, the rate of a way over that of a peer; of codes over fbgemm's, which gives such."""
    coded = f"{name}, codes"
    mine = coded if peer == "fbgemm int8" and any(coded in row["ways"] for row in rows) else name
    return {
        row["layer"]: own / other
        for row in rows
        if (own := _rate(row, mine)) is not None and (other := _rate(row, peer)) is not None
    }


def _rate(row: Row, name: str) -> Any:
    """Of a way; of float32 that of the better layout; None where it is not there."""
    rates = [
        way["gops"]
        for each, way in row["ways"].items()
        if each == name or (name == "float32" and each.startswith("float32"))
    ]
    return max(rates) if rates else None


def _seconds(rows: Sequence[Row], name: str) -> float:
    return math.fsum(
        row["count"] * row["megamacs"] * 2e-3 / rate for row in rows if (rate := _rate(row, name)) is not None
    )


def _largest(rows: Sequence[Row]) -> list[Row]:
    """The shapes with most work, until they have most of it."""
    work = {row["layer"]: row["count"] * row["megamacs"] for row in rows}
    ordered, taken, chosen = sorted(rows, key=lambda row: -work[row["layer"]]), 0.0, []
    for row in ordered:
        if taken >= MOST_WORK * sum(work.values()):
            break
        chosen.append(row)
        taken += work[row["layer"]]
    return chosen
