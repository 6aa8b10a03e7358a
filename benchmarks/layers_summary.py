"""What bench_layers.py found, told for all layers together."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

__all__ = ["summary"]

PEERS = ("float32", "oneDNN int8", "fbgemm int8")
MOST_WORK = 0.8


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, object]]:
    """Of each way: seconds of all layers as often as they occur, rates over those of each peer and who is slower.

    Rates are geometric means over the shapes. fbgemm gives codes, so what is held against it does too, where there is
    such a way. `of_peak` is of the shapes with most work that have 80 % of it together.
    """
    found: dict[str, dict[str, object]] = {}
    for name in rows[0]["ways"]:
        if name.endswith(", codes") or name == "float32 channels last":
            continue
        told: dict[str, object] = {"seconds": round(_seconds(rows, name), 2)}
        over = {peer: _ratios(rows, name, peer) for peer in PEERS}
        over["the faster int8"] = {
            layer: min(ratio, over[PEERS[2]].get(layer, ratio)) for layer, ratio in over[PEERS[1]].items()
        }
        for peer, ratios in over.items():
            if ratios:
                told[f"over {peer}"] = round(statistics.geometric_mean(ratios.values()), 2)
            if name not in PEERS and (slower := [layer for layer, ratio in ratios.items() if ratio < 1]):
                told[f"slower than {peer}"] = slower
        shares = [row["ways"][name]["of_peak"] for row in _largest(rows) if "of_peak" in row["ways"][name]]
        if shares:
            told["of_peak"] = {
                "least": min(shares), "most": max(shares), "0.7 and more": sum(x >= 0.7 for x in shares), "of": len(shares),
            }  # fmt: skip
        found[name] = told
    return found


def _ratios(rows: Sequence[dict[str, Any]], name: str, peer: str) -> dict[str, float]:
    """Of each layer, the rate of a way over that of a peer; of codes over fbgemm's, which gives such."""
    coded = f"{name}, codes"
    mine = coded if peer == "fbgemm int8" and coded in rows[0]["ways"] else name
    return {row["layer"]: _rate(row, mine) / rate for row in rows if (rate := _rate(row, peer)) is not None}


def _rate(row: dict[str, Any], name: str) -> Any:
    """Of a way; of float32 that of the better layout; None where it is not there."""
    ways = row["ways"]
    rates = [
        way["gops"]
        for each, way in ways.items()
        if each == name or (name == "float32" and each.startswith("float32"))
    ]
    return max(rates) if rates else None


def _seconds(rows: Sequence[dict[str, Any]], name: str) -> float:
    return math.fsum(
        row["count"] * row["megamacs"] * 2e-3 / rate for row in rows if (rate := _rate(row, name)) is not None
    )


def _largest(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The shapes with most work, until they have most of it."""
    work = {row["layer"]: row["count"] * row["megamacs"] for row in rows}
    ordered, taken, chosen = sorted(rows, key=lambda row: -work[row["layer"]]), 0.0, []
    for row in ordered:
        if taken >= MOST_WORK * sum(work.values()):
            break
        chosen.append(row)
        taken += work[row["layer"]]
    return chosen
